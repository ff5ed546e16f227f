"""How the time of a step grows with candidates and batch size, and memory with the size of the dataset.

    python benchmarks/growth.py --json growth.json

Time: ViT-B/32 with random weights and a vocabulary of 49,408 tokens, as in step.py. The same step takes turns at 10
and at 1,000 candidate texts, and at 16 and 32 preferences. Memory: towers of six narrow blocks, on image files of 640
x 480, at N and at 4 N rows, each in its own process. The small model makes the growth with the dataset visible.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

from inputs import IMAGES, clip_config, preferences, read_model, write_inputs
from step import CANDIDATES, PAIRS, WAYS, make_trainer, trained
from timing import Contestant, Step, parser, ratio, report, take_turns

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness

FEW, MANY = 10, 1_000
CANDIDATES_GOAL, BATCH_GOAL = 1.10, 2.1
SIDES = (640, 480)


def training(folder: Path, rows: int) -> Step:
    """Train two epochs on fixed images, with reference embeddings of every image."""
    data = preferences(folder, rows, CANDIDATES, "never")

    def run() -> None:
        with tempfile.TemporaryDirectory() as output:
            make_trainer(folder, WAYS["full"], data, True, output, num_train_epochs=2).train()

    return run


def evaluation(folder: Path, rows: int) -> Step:
    """Run the trainer's evaluation of preferences."""
    data = preferences(folder, rows, CANDIDATES, "never")

    def run() -> None:
        with tempfile.TemporaryDirectory() as output:
            make_trainer(folder, WAYS["full"], data, True, output, eval_dataset=data).evaluate()

    return run


def robustness(folder: Path, rows: int) -> Step:
    """Run the evaluation of clean and typographic accuracy."""
    data = preferences(folder, rows, CANDIDATES, "never")
    model, processor = read_model(folder)
    attack = TypographicAttack(words=data.class_names)
    images = RobustnessImages(data.dataset, attack, processor, data.class_names)
    return lambda: evaluate_robustness({"model": model}, images, ["{}"], batch_size=PAIRS, disable_tqdm=True)


def times(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the ratios of the step times, and the ways with a gradient for the text tower's embeddings."""
    step = functools.partial(trained, folder, quick=args.quick)
    found: dict[str, dict[str, Any]] = {}
    pairs = {
        f"time at {MANY} candidates, of that at {FEW}": (CANDIDATES_GOAL, {"candidates": FEW}, {"candidates": MANY}),
        f"time at {2 * PAIRS} pairs, of that at {PAIRS}": (BATCH_GOAL, {"pairs": PAIRS}, {"pairs": 2 * PAIRS}),
    }
    for way in ("full", "LoRA on q, v"):
        for name, (goal, small, large) in pairs.items():
            made = functools.partial(Contestant, threads=args.threads)
            with (
                made(functools.partial(step, WAYS[way], **small)) as one,
                made(functools.partial(step, WAYS[way], **large)) as other,
            ):
                seconds = take_turns({"small": one, "large": other}, args.rounds)
                found[f"{way}: {name}"] = {
                    "ratio": ratio(seconds["large"], seconds["small"]),
                    "goal": goal,
                    "seconds": seconds,
                    "text_gradient": other.take()[1][1],
                }
    return found


def memory(folder: Path, rows: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the peaks at `rows` and at four times as many rows, and the bytes added by a row."""
    found: dict[str, dict[str, Any]] = {}
    for make in (training, evaluation, robustness):
        peaks = []
        for count in (rows, 4 * rows):
            with Contestant(make, folder, count, threads=args.threads) as contestant:
                contestant.take()
                peaks.append(contestant.peak())
        found[make.__name__] = {"peak_bytes": peaks, "bytes_a_row": (peaks[1] - peaks[0]) / (3 * rows)}
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, help="N of the memory test; default 500, 50 with --quick")
    args = arguments.parse_args()
    rows = args.rows or (50 if args.quick else 500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "steps").mkdir()
        write_inputs(folder / "steps", 2 * PAIRS, args.quick)
        (folder / "memory").mkdir()
        write_inputs(folder / "memory", 4 * rows, True, SIDES)
        file = sum(path.stat().st_size for path in (folder / "memory" / IMAGES).iterdir()) / (4 * rows)
        timed = times(folder / "steps", args)
        grown = memory(folder / "memory", rows, args)
    cached = 2 * 4 * clip_config(True).projection_dim
    table = [[name, f["ratio"], f["goal"]] for name, f in timed.items()]
    table += [
        [f"{name}: peak at {4 * rows} rows, of that at {rows}", f["peak_bytes"][1] / f["peak_bytes"][0], None]
        for name, f in grown.items()
    ]
    bytes_a_row = {"file": file, "decoded": 3 * SIDES[0] * SIDES[1], "cached": cached}
    report(args, ["growth", "ratio", "goal"], table, {"times": timed, "memory": grown, "a_row": bytes_a_row})
    dense = [name for name, f in timed.items() if f["text_gradient"]]
    print(f"dense gradient for the frozen token embeddings: {', '.join(dense) or 'none'}")
    print(
        "a further row adds, in bytes: "
        + ", ".join(f"{name} {f['bytes_a_row']:.0f}" for name, f in grown.items())
        + f"; its two cached embeddings are {cached}, its image {file:.0f} as a file, {bytes_a_row['decoded']} decoded"
    )
    if dense:
        raise SystemExit("A frozen text tower got a gradient.")


if __name__ == "__main__":
    main()
