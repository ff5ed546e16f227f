"""Losses equal the published ones: values and gradients, to 1e-9 in float64.

The case files are read from the folder named by CLIP_PO_LOSS_CASES, else from tests/loss_cases.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from clip_po.losses import LossSettings, PreferenceLogps, kl_regularization, preference_loss

FOLDER = Path(os.environ.get("CLIP_PO_LOSS_CASES") or Path(__file__).parent / "loss_cases")
CASES = [
    pytest.param(case, id=f"{path.stem}-{number}-{case['kind']}")
    for path in sorted(FOLDER.glob("*.json"))
    for number, case in enumerate(json.loads(path.read_text())["cases"])
]
NAMES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto_pair", "ce": "sft"}


def logps_of(case, policy, typographic):
    """Chosen and rejected log-probabilities of a case, as the trainer hands them to the losses."""
    chosen = torch.tensor(case["true"]).unsqueeze(-1)
    rejected = torch.tensor(case["typographic"]).unsqueeze(-1)
    ref = torch.tensor(case["reference_logits_typographic"], dtype=torch.float64).log_softmax(-1)
    policy = policy.log_softmax(-1)
    if case["params"].get("reference_free"):
        ref = torch.zeros_like(ref)
    return PreferenceLogps(
        policy.gather(-1, chosen).squeeze(-1),
        policy.gather(-1, rejected),
        ref.gather(-1, chosen).squeeze(-1),
        ref.gather(-1, rejected),
    )


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_published_ones(case):
    params = case["params"]
    clean, typographic = (
        torch.tensor(case[f"policy_logits_{name}"], dtype=torch.float64, requires_grad=True)
        for name in ("clean", "typographic")
    )
    ref_clean = torch.tensor(case["reference_logits_clean"], dtype=torch.float64).log_softmax(-1)
    kl = kl_regularization(ref_clean, clean.log_softmax(-1)).mean()
    settings = LossSettings(**{k: v for k, v in params.items() if k in LossSettings.__dataclass_fields__})
    losses = preference_loss(logps_of(case, typographic, typographic), [NAMES[case["kind"]]], [1.0], settings, kl)
    loss = losses.mean() + params["lambda_"] * kl
    loss.backward()

    assert loss.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-9)
    for tensor, name in ((clean, "clean"), (typographic, "typographic")):
        expected = torch.tensor(case[f"grad_{name}"], dtype=torch.float64)
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-9, atol=1e-9)
