"""A whole run of three epochs with an evaluation after each, compared with a run of straight steps (baseline.py).

    python benchmarks/run.py --json run.json

ViT-B/32 with random weights, 16 preferences per step with their ordinary images, 100 candidate texts, float32, AdamW.
The time starts with loading the model and includes building the caches. Runs take turns, each in its own process with
its own peak memory. Both read the same rows, with the same attack and collator. Evaluation computes the loss on
separate rows. The straight run averages all weights after each step, as in the paper. clip_po's runs average only the
trained weights, in the rows named "averaged".
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from baseline import StraightStep
from inputs import preferences, read_model, write_inputs
from step import BETA, CANDIDATES, PAIRS, WAYS, Way, make_trainer
from timing import Contestant, Step, parser, ratio, report
from torch.utils.data import DataLoader

from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.pairs import PreferencePairs
from clip_po.data.sampler import EpochSampler
from clip_po.training.averaging import BetaMovingAverageCallback

EPOCHS = 3
LEARNING_RATE = 2e-5
PEAK_GOAL = 0.60


@dataclass(frozen=True)
class Run:
    """A way of training, and its maximum share of the straight run.

    Attributes:
        way: As in step.py.
        goal: Maximum ratio to the time of the straight run.
        averaged: Whether the weights are averaged.
        micro_batches: Number of parts into which the preferences of a step are split.
    """

    way: Way
    goal: float
    averaged: bool = False
    micro_batches: int = 1


RUNS = {
    "full": Run(WAYS["full"], 0.72),
    "full, averaged": Run(WAYS["full"], 0.72, averaged=True),
    "full, two micro-batches": Run(WAYS["full"], 0.72, micro_batches=2),
    "LoRA on q, v": Run(WAYS["LoRA on q, v"], 0.58),
    "full, fresh attack, label-free": Run(WAYS["full, fresh attack, label-free"], 0.72),
    "LoRA, fresh attack, label-free": Run(WAYS["LoRA, fresh attack, label-free"], 0.58),
}


@dataclass(frozen=True)
class Rows:
    """Number of rows for training and evaluation, and their folder."""

    folder: Path
    training: int
    evaluation: int


def our_run(rows: Rows, ours: Run, quick: bool) -> Step:
    """Run the trainer and return the last evaluation loss."""

    def run() -> float:
        held_out = preferences(rows.folder, rows.evaluation, CANDIDATES, ours.way.redraw, first=rows.training)
        train = preferences(rows.folder, rows.training, CANDIDATES, ours.way.redraw)
        with tempfile.TemporaryDirectory() as output:
            trainer = make_trainer(
                rows.folder,
                ours.way,
                train,
                quick,
                output,
                per_device_train_batch_size=PAIRS // ours.micro_batches,
                gradient_accumulation_steps=ours.micro_batches,
                num_train_epochs=EPOCHS,
                learning_rate=LEARNING_RATE,
                eval_strategy="epoch",
                eval_dataset=held_out,
                callbacks=[BetaMovingAverageCallback()] if ours.averaged else [],
            )
            trainer.train()
        return next(log["eval_loss"] for log in reversed(trainer.state.log_history) if "eval_loss" in log)

    return run


def straight_run(rows: Rows) -> Step:
    """Run straight steps and return the last evaluation loss."""

    def run() -> float:
        train = preferences(rows.folder, rows.training, CANDIDATES, "never")
        held_out = preferences(rows.folder, rows.evaluation, CANDIDATES, "never", first=rows.training)
        model, processor = read_model(rows.folder)
        baseline = StraightStep(model, processor, train.candidate_texts, BETA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        collator = DataCollatorForContrastivePreference(processor, train.candidate_texts)
        sampler = EpochSampler(len(train), PAIRS, seed=0)
        loader, held_out_loader = (
            DataLoader(PreferencePairs(r, "clean_image"), PAIRS, sampler=s, collate_fn=collator)
            for r, s in ((train, sampler), (held_out, EpochSampler(len(held_out), PAIRS, seed=None)))
        )
        losses: list[float] = []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for batch in loader:
                baseline.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                baseline.update_average()
            with torch.no_grad():
                losses = [baseline.loss(batch).item() for batch in held_out_loader]
        return statistics.mean(losses)

    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--training_rows", type=int, default=4 * PAIRS)
    arguments.add_argument("--evaluation_rows", type=int, default=PAIRS)
    arguments.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    arguments.set_defaults(rounds=1)
    args = arguments.parse_args()
    made = {"straight": (straight_run,), **{name: (our_run, RUNS[name], args.quick) for name in args.runs}}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    losses: dict[str, float] = {}
    peaks: dict[str, int] = dict.fromkeys(made, 0)
    with tempfile.TemporaryDirectory() as name:
        rows = Rows(Path(name), args.training_rows, args.evaluation_rows)
        write_inputs(rows.folder, rows.training + rows.evaluation, args.quick)
        for _ in range(args.rounds):
            for run, (make, *rest) in made.items():
                with Contestant(make, rows, *rest, threads=args.threads) as contestant:
                    took, losses[run] = contestant.take()
                    seconds[run].append(took)
                    peaks[run] = max(peaks[run], contestant.peak())
    found = {
        run: {
            "seconds": seconds[run],
            "of_straight": ratio(seconds[run], seconds["straight"]),
            "goal": RUNS[run].goal if run in RUNS else None,
            "peak_bytes": peaks[run],
            "peak_of_straight": peaks[run] / peaks["straight"],
            "eval_loss": losses[run],
        }
        for run in made
    }
    table = [
        [
            run,
            statistics.median(f["seconds"]),
            f["of_straight"],
            f["goal"],
            f["peak_bytes"] / 2**20,
            f["peak_of_straight"],
            f["eval_loss"],
        ]
        for run, f in found.items()
    ]
    columns = ["run", "seconds", "of the straight run", "goal", "peak, MiB", "of its peak", "last eval_loss"]
    report(args, columns, table, {"peak_goal": PEAK_GOAL, "runs": found})


if __name__ == "__main__":
    main()
