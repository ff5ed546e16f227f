"""What a step costs if the text tower trains: with images embedded once, and with many candidates in chunks.

    python benchmarks/text_tower.py --json text_tower.json

ViT-B/32 with random weights, 16 preferences with their 16 ordinary images, texts of 8 to 10 tokens, bfloat16, fixed
images. The text tower trains alone. The first table compares a step whose image embeddings were computed before
training with one that computes them, at 100 candidates. The second shows the time of a step and the peak memory of its
process at growing numbers of candidates, all at once and in chunks of 64 (`tower_chunk_size`), each in its own
process. Seconds are those of the processor, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from inputs import preferences, write_inputs
from step import CANDIDATES, PAIRS, Way, make_trainer
from timing import Contestant, Step, parser, ratio, report

CHUNK = 64
COUNTS = (250, 1_000)
GIB = 2**30


def trained(folder: Path, quick: bool, candidates: int, **config: Any) -> Step:
    """Return a step of the text tower alone, which returns the seconds that it took a processor."""
    rows = preferences(folder, PAIRS, candidates, "never")
    alone = {"train_vision_model": False, "train_text_model": True, "bf16": True}
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(folder, Way(1.0), rows, quick, output, **alone, **config)
    trainer.state.max_steps = 1  # Trainer.train sets it the same way
    batches, total = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.accelerator.device)

    def step() -> float:
        start = time.process_time()
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(batches[0]), total)
        return time.process_time() - start

    return step


def images_once(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of steps with and without image embeddings of before, and their ratio."""
    step = functools.partial(trained, folder, args.quick, CANDIDATES)
    made = functools.partial(Contestant, threads=args.threads)
    with made(step) as once, made(functools.partial(step, precompute_ref_log_probs=False)) as each_step:
        rounds = [(once.take()[1], each_step.take()[1]) for _ in range(args.rounds + 1)][1:]  # the first one warms up
    seconds = dict(zip(("once", "each step"), zip(*rounds, strict=True), strict=True))
    return {"ratio": ratio(seconds["once"], seconds["each step"]), "seconds": seconds}


def candidates(folder: Path, args: argparse.Namespace, count: int, chunk: int | None) -> dict[str, Any]:
    """Return the seconds of a step and the peak memory of its process, in bytes."""
    step = functools.partial(trained, folder, args.quick, count, tower_chunk_size=chunk)
    with Contestant(step, threads=args.threads) as contestant:
        seconds = [contestant.take()[1] for _ in range(args.rounds)]
        return {"candidates": count, "chunk": chunk, "seconds": sorted(seconds), "peak": contestant.peak()}


def main() -> None:
    """Print both tables."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), PAIRS, args.quick)
        once = images_once(Path(folder), args)
        report(args, ["step", "ratio"], [["images embedded once, of images embedded in each step", once["ratio"]]], {})
        found = [candidates(Path(folder), args, count, chunk) for count in COUNTS for chunk in (None, CHUNK)]
    rows = [
        [row["candidates"], row["chunk"] or "all", row["seconds"][len(row["seconds"]) // 2], row["peak"] / GIB]
        for row in found
    ]
    report(
        args,
        ["candidates", "at a time", "processor s a step", "peak GB"],
        rows,
        {"images once": once, "candidates": found},
    )


if __name__ == "__main__":
    main()
