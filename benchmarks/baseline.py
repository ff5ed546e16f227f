"""The straight step: a direct implementation of the paper, and the baseline of the other benchmarks.

Policy and reference are whole CLIPModels. In each step, both run on every image (preferences and ordinary images) and
on every candidate text. Gradients go through both towers. The average of the weights is one more copy of all of them.
The baseline is not made slower than necessary: each model runs one forward pass for both sets of images, the reference
runs without gradients, texts are padded to the longest text as in clip_po, and losses, rows and pixels are clip_po's
own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from clip_po.losses import LossSettings, PreferenceLogps, kl_regularization, preference_loss


class StraightStep:
    """One step of DPO with the regularization at lambda = 1.

    Args:
        model: The policy. All of it is trained.
        processor: Its processor.
        candidate_texts: M candidate texts, shared by all rows.
        beta: As for `sigmoid_loss`.
    """

    def __init__(
        self, model: CLIPModel, processor: CLIPProcessor, candidate_texts: Sequence[str], beta: float
    ) -> None:
        self.model = model.requires_grad_(True).train()
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.processor = processor
        self.candidate_texts = list(candidate_texts)
        self.settings = LossSettings(beta)
        self.steps = 0

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss, Tensor[], of a batch from clip_po's collator."""
        tokens = self.processor.tokenizer(self.candidate_texts, padding=True, return_tensors="pt")
        inputs = {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "pixel_values": torch.cat([batch["pixel_values"], batch["reg_pixel_values"]]),
        }
        policy, policy_reg = self.model(**inputs).logits_per_image.log_softmax(dim=-1).chunk(2)
        with torch.no_grad():
            reference, reference_reg = self.reference(**inputs).logits_per_image.log_softmax(dim=-1).chunk(2)
        chosen, rejected = batch["chosen"].unsqueeze(-1), batch["rejected"]
        logps = PreferenceLogps(
            policy.gather(-1, chosen).squeeze(-1),
            policy.gather(-1, rejected),
            reference.gather(-1, chosen).squeeze(-1),
            reference.gather(-1, rejected),
        )
        losses = preference_loss(logps, ["sigmoid"], [1.0], self.settings)
        return losses.mean() + kl_regularization(reference_reg, policy_reg).mean()

    @torch.no_grad()
    def update_average(self) -> None:
        """Add the current weights to the running mean."""
        self.steps += 1
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 / self.steps)
