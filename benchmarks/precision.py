"""A training step in float32 and bfloat16, with eager and sdpa attention, compiled and checkpointed.

    python benchmarks/precision.py --json precision.json

clip_po's trainer trains the full vision tower on fixed attacks with cached reference embeddings. There are two models:
ViT-B/32 with random weights (50 tokens an image; `--pairs` preferences with their ordinary images) and the small model
of the demo (37 tokens). Each way runs in its own process and takes turns with the plain way (float32, sdpa, nothing
else), to which its ratio refers. The times cover forward and backward. `first step` is the additional time of the very
first step, which shows the cost of compiling. The peak memory includes weights, reference, gradients and the state of
AdamW. A first table shows the seconds of one block's attention alone, by the tokens of an image.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from inputs import MODEL, preferences, write_inputs
from step import WAYS, make_trainer
from timing import Contestant, Step, parser, ratio, report, take_turns
from transformers import CLIPModel, CLIPProcessor, CLIPVisionConfig, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip.modeling_clip import CLIPAttention, eager_attention_forward

from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.tables import format_table

CANDIDATES = 100
STEPS = 2
"""Optimizer steps before the timing starts. If a way is wrong, its loss then differs."""
MODELS = ("vit-b-32", "digits")
LENGTHS = (50, 197, 577)
"""Tokens per image of ViT-B/32 and B/16 at 224 pixels, and of L/14 at 336."""
TOKENS = 1600
"""Approximate number of tokens of all images in a call."""


@dataclass(frozen=True)
class Way:
    """One way of computing the same step."""

    bf16: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    checkpointed: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("compiled", "checkpointed") if getattr(self, name)]
        return ", ".join(["bfloat16" if self.bf16 else "float32", self.attention, *extras])


ALL = [
    Way(bf16, attention, compiled, checkpointed)
    for compiled, checkpointed, bf16, attention in itertools.product(
        (False, True), (False, True), (False, True), ("sdpa", "eager")
    )
]
PLAIN = ALL[0]


class FirstStep(TrainerCallback):
    """Time the first step, including the optimizer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock after the first step."""
        self.seconds = self.seconds or time.perf_counter() - self._begin


def write_model(folder: Path, name: str, pairs: int, quick: bool) -> None:
    """Write a model of `MODELS`, and images for ViT-B/32, into a folder."""
    if name == "vit-b-32":
        write_inputs(folder, pairs, quick)
    else:
        CLIPModel.from_pretrained(MODEL_PATH).save_pretrained(folder / MODEL)
        CLIPProcessor.from_pretrained(MODEL_PATH).save_pretrained(folder / MODEL)


def read_rows(folder: Path, name: str, pairs: int) -> TypographicPreferences:
    """Return a batch of preferences for a model of `MODELS`."""
    if name == "vit-b-32":
        return preferences(folder, pairs, CANDIDATES, "never")
    digits = load_digits_dataset("train").select(range(pairs))
    return TypographicPreferences(
        digits, replace(digit_attack("training"), redraw="never"), DIGIT_NAMES, PROMPT_TEMPLATE
    )


def trained(folder: Path, name: str, way: Way, pairs: int, quick: bool) -> Step:
    """Return the step of a way after warm-up. The step returns the loss and the seconds of the very first step."""
    clock = FirstStep()
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(
            folder,
            WAYS["full"],
            read_rows(folder, name, pairs),
            quick,
            output,
            per_device_train_batch_size=pairs,
            max_steps=STEPS,
            precompute_ref_log_probs=True,
            bf16=way.bf16,
            torch_compile=way.compiled,
            activation_checkpointing=way.checkpointed,
            callbacks=[clock],
        )
        trainer.encoder.set_attn_implementation(way.attention)
        trainer.train()
    trainer.state.max_steps += 1
    batches, total = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.accelerator.device)

    def step() -> tuple[float, float]:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model_wrapped, dict(batches[0]), total)
        return loss.item(), clock.seconds

    return step


def attention_seconds(rounds: int) -> list[dict[str, Any]]:
    """Time forward and backward of one block's attention alone, in turns. The best of all rounds counts."""
    module = CLIPAttention(CLIPVisionConfig())
    kinds = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}
    cases = list(itertools.product(LENGTHS, (torch.float32, torch.bfloat16), kinds))
    best = dict.fromkeys(cases, (math.inf, math.inf))
    for _ in range(1 + 4 * rounds):
        for length, dtype, kind in cases:
            shape = (max(1, TOKENS // length), module.num_heads, length, module.head_dim)
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            begin = time.perf_counter()
            out, _ = kinds[kind](module, *inputs, None, scaling=module.scale)
            between = time.perf_counter()
            out.backward(torch.ones_like(out))
            found = between - begin, time.perf_counter() - between
            forward, backward = map(min, found, best[length, dtype, kind])
            best[length, dtype, kind] = forward, backward
    return [
        {"tokens": length, "dtype": str(dtype)[6:], "attention": kind, "forward": forward, "backward": backward}
        for (length, dtype, kind), (forward, backward) in best.items()
    ]


def measure(way: Way, plain: Contestant, ours: Contestant, rounds: int) -> dict[str, Any]:
    """Return the seconds of a way and of the plain way, in turns."""
    seconds = take_turns({"plain": plain, "ours": ours}, rounds)
    loss, first = ours.take()[1]
    return {
        "way": vars(way),
        "seconds": seconds,
        "of_plain": ratio(seconds["ours"], seconds["plain"]),
        "first_seconds": first - statistics.median(seconds["ours"]),
        "peak_bytes": ours.peak(),
        "loss": loss,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--pairs", type=int, default=16, help="preferences per step, of two images each")
    arguments.add_argument("--without_compiled", action="store_true", help="skip the ways that need a C++ compiler")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    alone = attention_seconds(1 if args.quick else args.rounds)
    seconds = [[*list(row.values())[:3], f"{row['forward']:.4f}", f"{row['backward']:.4f}"] for row in alone]
    print(format_table(list(alone[0]), seconds))
    ways = [way for way in ALL if not (way.compiled and args.without_compiled)]
    found: dict[str, dict[str, Any]] = {}
    table = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            write_model(folder, name, args.pairs, args.quick)
            shared = (args.pairs, args.quick)
            found[name] = {}
            with Contestant(trained, folder, name, PLAIN, *shared, threads=args.threads) as plain:
                for way in ways:
                    with Contestant(trained, folder, name, way, *shared, threads=args.threads) as ours:
                        found[name][str(way)] = measure(way, plain, ours, args.rounds)
        lowest = found[name][str(PLAIN)]["peak_bytes"]
        for way, f in found[name].items():
            median = statistics.median(f["seconds"]["ours"])
            memory = [f["peak_bytes"] / 2**20, f["peak_bytes"] / lowest]
            table.append([name, way, median, f["of_plain"], f["first_seconds"], *memory, f"{f['loss']:.5f}"])
    columns = ["model", "way", "seconds", "of the plain one", "first step, s more", "peak, MiB", "of its peak", "loss"]
    report(args, columns, table, {"attention": alone, "models": found})


if __name__ == "__main__":
    main()
