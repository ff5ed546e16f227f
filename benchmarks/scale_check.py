"""The formulas of docs/scale.md compared with the allocations of a step and with its seconds on this machine.

    python benchmarks/scale_check.py

Memory: the step runs on fake tensors, which have sizes but no data, and every allocation is counted. This way the
largest models fit. Seconds: the operations per second of one step (B/32, the whole tower) are measured. The seconds of
the other steps are predicted from this rate and measured too, without the optimizer. If the machine has a GPU, the GPU
is measured.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scale_formulas import MODELS, Step, peak, step_flops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPModel

from clip_po.encoding import encode_images
from clip_po.evaluation.tables import format_table
from clip_po.losses import LossSettings, preference_loss
from clip_po.models import dual_encoder
from clip_po.policy import (
    CandidateLogps,
    candidate_logps,
    preference_logps,
    regularization_kl,
)
from clip_po.reference import frozen_copy
from clip_po.trainable import tower_of

GIGA = 1e9


class Allocations(TorchDispatchMode):
    """Count the bytes of live tensors and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def stepper(step: Step, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return forward and backward on fake rows, with the trainer's model and reference, and AdamW."""
    with torch.device("meta"):
        model: nn.Module = CLIPModel(step.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(tower_of(name) == "vision")
        if step.rank:
            layers = step.config.vision_config.num_hidden_layers
            adapted = "|".join(str(layer) for layer in range(layers - step.reached, layers))
            targets = rf".*vision_model.*layers\.({adapted})\..*\.(q_proj|v_proj)"
            model = get_peft_model(model, LoraConfig(r=step.rank, target_modules=targets))
        reference = frozen_copy(model)
        if step.rank:
            reference.base_model.disable_adapter_layers()
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the old one, so that its id is not reused
    for module in (*model.modules(), *reference.modules()):
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:
                new = nn.Parameter(0.02 * torch.randn(old.shape, device=device), requires_grad=old.requires_grad)
                made[id(old)] = old, new
            setattr(module, name, made[id(old)][1])
        for name, old in module.named_buffers(recurse=False):  # position ids
            setattr(module, name, torch.arange(old.shape[-1], device=device).expand(old.shape))
    model.train()
    if step.checkpointing:
        dual_encoder(model).gradient_checkpointing_enable({"use_reentrant": False})
    # foreach is torch's default only on a GPU. It makes a copy of all tensors.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    size, dim = step.config.vision_config.image_size, step.config.projection_dim
    encoded, known = torch.randn(step.candidates, dim, device=device), torch.randn(step.pairs, dim, device=device)
    # Each text embedding is kept, and a stack of all of them too.
    texts = encoded.clone()
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    rows = {
        "chosen": torch.zeros(step.pairs, dtype=torch.long, device=device),
        "rejected": torch.ones(step.pairs, 1, dtype=torch.long, device=device),
    }

    def passes() -> None:
        pixels = [torch.randn(step.pairs, 3, size, size, device=device) for _ in range(2)]
        scale = dual_encoder(model).logit_scale
        with torch.autocast(device.type, torch.bfloat16, enabled=step.bf16):
            images = model(input_ids=tokens, pixel_values=torch.cat(pixels)).image_embeds.split(step.pairs)
        policy = CandidateLogps(*(candidate_logps(embeds, texts, scale.exp()) for embeds in images))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=step.bf16):
            seen = [encode_images(reference, batch) for batch in pixels[: step.seen]]
            embeds = [*seen, *[known] * (2 - step.seen)]
            compared = CandidateLogps(*(candidate_logps(found, texts, scale.exp()) for found in embeds))
        logps, kl = preference_logps(policy, compared, rows), regularization_kl(policy, compared)
        loss = preference_loss(logps, ["sigmoid"], [1.0], LossSettings()).mean() + kl.mean()
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return passes, update


def counted_peak(step: Step) -> int:
    """Return the peak bytes of a second step, after a first step that creates the optimizer's state."""
    with FakeTensorMode(), Allocations() as live:
        passes, update = stepper(step, torch.device("cpu"))
        for _ in range(2):
            live.peak = live.now
            passes()
            update()
    return live.peak


def measured_seconds(step: Step, device: torch.device, rounds: int) -> float:
    """Return the seconds of the best of several forward and backward passes after the first."""
    passes, update = stepper(step, device)
    best = float("inf")
    for number in range(rounds + 1):
        start = time.perf_counter()
        passes()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
        update()
    return best


MEMORY: list[tuple[str, str, dict[str, Any]]] = [
    ("B/32", "full", {"pairs": 64}),
    ("B/32", "full, float32", {"pairs": 64, "bf16": False}),
    ("B/32", "full, 10,000 candidates", {"pairs": 64, "candidates": 10_000}),
    ("L/14", "full", {"pairs": 32}),
    ("L/14", "LoRA", {"pairs": 32, "rank": 16}),
    ("L/14", "LoRA, last 4 blocks", {"pairs": 32, "rank": 16, "blocks": 4}),
    ("L/14", "full, checkpointing", {"pairs": 32, "checkpointing": True}),
    ("bigG/14", "full", {"pairs": 8}),
    ("bigG/14", "LoRA", {"pairs": 8, "rank": 16}),
    ("bigG/14", "LoRA, checkpointing", {"pairs": 8, "rank": 16, "checkpointing": True}),
    # The formulas were developed with the steps above, without the steps below.
    ("B/16", "full, float32", {"pairs": 48, "bf16": False}),
    ("L/14-336", "full", {"pairs": 16}),
    ("L/14", "full, a stream", {"pairs": 16, "seen": 2}),
    ("H/14", "full, checkpointing", {"pairs": 64, "checkpointing": True}),
    ("g/14", "LoRA of rank 8", {"pairs": 16, "rank": 8}),
    ("bigG/14", "full", {"pairs": 1}),
    ("B/32", "full, 100,000 candidates", {"pairs": 64, "candidates": 100_000}),
    (
        "B/32",
        "LoRA, last 2 blocks, fixed, 50,000",
        {"pairs": 256, "rank": 16, "blocks": 2, "candidates": 50_000, "seen": 0},
    ),
]
SECONDS: list[tuple[str, str, dict[str, Any]]] = [
    ("B/32", "full", {"pairs": 8}),
    ("B/32", "full, reference cached", {"pairs": 8, "seen": 0}),
    ("B/32", "LoRA", {"pairs": 8, "rank": 16}),
    ("B/32", "LoRA, last 4 blocks", {"pairs": 8, "rank": 16, "blocks": 4}),
    ("B/16", "full", {"pairs": 4}),
    ("L/14", "full", {"pairs": 2}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="seconds under bf16 autocast instead of float32")
    parser.add_argument("--quick", action="store_true", help="the smallest model only")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    found: dict[str, Any] = {"memory": [], "seconds": []}

    rows: list[list[str]] = []
    for model, how, options in MEMORY:
        if args.quick and model != "B/32":
            continue
        step = Step(MODELS[model], **options)
        formula, counted = peak(step), counted_peak(step)
        found["memory"].append({"model": model, "step": how, "formula": formula, "counted": counted})
        rows.append([model, how, str(step.pairs), *_beside(formula / GIGA, counted / GIGA, "GB")])
    print(format_table(["model", "step", "pairs", "formula", "counted", "formula / counted"], rows), end="\n\n")

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    rows, rate = [], 0.0
    for model, how, options in SECONDS:
        if args.quick and model != "B/32":
            continue
        step = Step(MODELS[model], bf16=args.bf16, candidates=100, **options)
        measured, operations = measured_seconds(step, device, args.rounds), step_flops(step)
        rate = rate or operations / measured
        predicted = operations / rate
        found["seconds"].append({"model": model, "step": how, "predicted": predicted, "measured": measured})
        rows.append([model, how, str(step.pairs), *_beside(predicted, measured, "s")])
    print(format_table(["model", "step", "pairs", "predicted", "measured", "predicted / measured"], rows))
    print(f"{rate / GIGA:.0f} GFLOP/s on {device}, {torch.get_num_threads()} threads: the first row sets it")
    found |= {"flops": rate, "threads": torch.get_num_threads()}
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def _beside(formula: float, found: float, unit: str) -> list[str]:
    return [f"{formula:.2f} {unit}", f"{found:.2f} {unit}", f"{formula / found:.2f}"]


if __name__ == "__main__":
    main()
