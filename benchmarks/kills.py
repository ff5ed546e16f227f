"""Kill a training run repeatedly, resume it each time, and compare the result with an uninterrupted run.

    python benchmarks/kills.py --kills 20 --json kills.json

The digits model trains with attacks redrawn each epoch, dropout, accumulation, evaluations, an average of its weights
and two data-loading workers. It keeps one checkpoint. The kills (SIGKILL, which no process can catch) come at moments
drawn from a seed: at any time, while a checkpoint is being written, and while the older one is being deleted. The
files left on disk show what each kill hit. From the first whole checkpoint on, there must always be one. At the end,
every file of the last checkpoint and the averaged model must equal the files of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.report.report_file import write_json
from clip_po.evaluation.tables import format_table
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.averaging import BetaMovingAverageCallback
from clip_po.training.checkpoints import is_whole, last_whole_checkpoint

WEIGHTS = "model.safetensors"
CONTEXT = "dataloader_multiprocessing_context"
# Only forked workers notice when their process is gone. Before transformers 5.15 they can't be asked for.
WORKERS = {CONTEXT: "fork", "dataloader_num_workers": 2} if hasattr(ContrastivePOConfig, CONTEXT) else {}
PROGRESS = "steps_done"
SAVE_STEPS = 2
STEPS_EACH = 6
"""Steps of the run per kill: more than the average number of steps between two kills."""

AIMS = ("any", "writing", "rotating")
"""Moments at which kills are aimed, in turn."""

DELAYS = {"any": 0.5, "writing": 0.05, "rotating": 0.001}
"""Maximum seconds between the awaited moment and the kill."""

PAUSE = 0.0002
"""Seconds between two checks of the folder. Deleting a checkpoint takes about a millisecond."""

LONGEST = 300.0
"""Maximum seconds until a run reaches the moment of its kill."""

TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
RUNS_OWN = ("training_args.bin", "training_args.json")
"""Values that differ between two runs with the same settings: folders and durations."""


class NoteSteps(TrainerCallback):
    """Write the number of completed steps next to the checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        """Overwrite the number in place, so that there is always one to read."""
        Path(args.output_dir, PROGRESS).write_text(f"{state.global_step:9}")


def train(folder: str, steps: int) -> None:
    """Train to the end, from the last whole checkpoint if there is one. This is the process that is killed."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    digits, attack = load_digits_dataset("train"), digit_attack("training")
    rows, evaluated = (
        TypographicPreferences(digits.select(part), attack, DIGIT_NAMES, PROMPT_TEMPLATE)
        for part in (range(40), range(40, 50))
    )
    config = CLIPConfig.from_pretrained(MODEL_PATH)
    config.vision_config.attention_dropout = 0.1  # so that random numbers matter
    trainer = ContrastivePOTrainer(
        CLIPModel.from_pretrained(MODEL_PATH, config=config),
        args=ContrastivePOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=3,  # does not divide the rows
            gradient_accumulation_steps=2,
            **WORKERS,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            eval_strategy="steps",
            eval_steps=5,
            learning_rate=1e-4,
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=CLIPProcessor.from_pretrained(MODEL_PATH),
        candidate_texts=rows.candidate_texts,
        callbacks=[BetaMovingAverageCallback(), NoteSteps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    trainer.save_model()


@dataclass(frozen=True)
class Kill:
    """One kill, as read from the disk afterwards.

    Attributes:
        aim: "any", "writing" or "rotating": the awaited moment.
        step: Completed optimizer steps.
        phase: What it hit: "writing" a checkpoint, "rotating" (the new one is marked, the older one not deleted
            yet), or "training": everything else.
        whole_step: Step of the last whole checkpoint; None before the first.
        lost: Steps to repeat after the resume.
    """

    aim: str
    step: int
    phase: str
    whole_step: int | None
    lost: int


@dataclass
class Outcome:
    """Kills and their outcome.

    Attributes:
        kills: In order.
        looks: Number of checks for a whole checkpoint, after the first one was written.
        looks_in_vain: Number of checks that found none.
        different: Files that differ from the uninterrupted run.
    """

    kills: list[Kill] = field(default_factory=list)
    looks: int = 0
    looks_in_vain: int = 0
    different: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed and no file differs."""
        return not self.looks_in_vain and not self.different


class Watched:
    """The folder of a run, observed from outside while the run writes to it.

    Args:
        folder: Where the run writes; what it holds now is left over from earlier runs.
        outcome: Where looks are counted.
    """

    def __init__(self, folder: Path, outcome: Outcome) -> None:
        self.folder, self.outcome = folder, outcome
        self.had_one = last_whole_checkpoint(folder) is not None
        self.before = self._folders()

    def look(self) -> tuple[list[int], list[int]]:
        """Return the steps of the whole checkpoints, and of the partial checkpoints of this run."""
        for _ in range(2):  # a listed checkpoint may be replaced before it is read
            now = self._folders()
            whole = sorted(step for step in now if is_whole(self.folder / f"checkpoint-{step}"))
            if whole:
                break
        self.had_one = self.had_one or bool(whole)
        if self.had_one:
            self.outcome.looks += 1
            self.outcome.looks_in_vain += not whole
        return whole, [step for step in now if step not in whole and self.before.get(step) != now[step]]

    def phase(self) -> str:
        """Return what the run is doing, as far as the disk shows."""
        whole, partial = self.look()
        if any(step > max(whole, default=0) for step in partial):
            return "writing"
        over = set(whole[:-1]) | {step for step in self._folders() if step < max(whole, default=0)}
        return "rotating" if over else "training"

    def steps_done(self) -> int:
        """Return the completed steps of the run."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self.folder / PROGRESS).read_text())
        return 0

    def _folders(self) -> dict[int, int]:
        """Return checkpoints by step with their inodes, which tell old and new folders of the same name apart."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith("checkpoint-"):
                    found[int(entry.name.split("-")[1])] = entry.inode()
        return found


def wait_for(aim: str, rng: random.Random, watched: Watched, process: multiprocessing.process.BaseProcess) -> None:
    """Wait for the moment of a kill, or for the end of the run."""
    deadline = time.monotonic() + LONGEST
    earliest = watched.steps_done() + rng.randint(1, 2 * SAVE_STEPS)
    delay = rng.uniform(0, DELAYS[aim])
    while process.is_alive() and time.monotonic() < deadline:
        phase = watched.phase()
        if watched.steps_done() >= earliest and aim in ("any", phase):
            time.sleep(delay)
            return
        time.sleep(PAUSE)


def kill_and_resume(
    folder: Path, kills: int, seed: int = 0, said: Callable[[Kill], None] = lambda kill: None
) -> Outcome:
    """Train twice, once with kills, and compare the results.

    Args:
        folder: An empty folder.
        kills: How many, >= 1.
        seed: Seed of their moments.
        said: Called with each kill.

    Returns:
        The kills, the checks and the files that differ.

    Raises:
        RuntimeError: If a run that was not killed ends with an error.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once instead of once per run
    context.set_forkserver_preload(["clip_po.trainer", "clip_po.training.averaging", "sklearn.datasets", "peft"])
    steps, rng, outcome = STEPS_EACH * kills, random.Random(seed), Outcome()
    alone, killed = folder / "alone", folder / "killed"

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train, args=(str(output), steps))
        process.start()
        return process

    def finish(output: Path) -> None:
        process = start(output)
        process.join()
        if process.exitcode:
            raise RuntimeError(f"The run in {output} ended with exit code {process.exitcode}.")

    for number in range(kills):
        aim = AIMS[number % len(AIMS)]
        watched = Watched(killed, outcome)
        process = start(killed)
        wait_for(aim, rng, watched, process)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"The run in {killed} ended by itself with exit code {process.exitcode}.")
        whole, _ = watched.look()
        done, last = watched.steps_done(), max(whole, default=0)
        outcome.kills.append(Kill(aim, done, watched.phase(), last, done - last))
        said(outcome.kills[-1])
    finish(killed)
    finish(alone)
    outcome.different = differences(alone, killed, steps)
    return outcome


def differences(first: Path, second: Path, steps: int) -> list[str]:
    """Return the files that differ between two finished runs, in the averaged model and the last checkpoint."""
    checkpoint = f"checkpoint-{steps}"
    names = [WEIGHTS, *(f"{checkpoint}/{path.name}" for path in sorted((first / checkpoint).iterdir()))]
    return [name for name in names if not same(read(first / name), read(second / name))]


def read(path: Path) -> Any:
    """Return the contents of a checkpoint file that must be the same after a resume."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        with safe_globals():
            return torch.load(path, weights_only=True)
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        return [
            {key: value for key, value in entry.items() if key not in TIMES}
            for entry in state["log_history"]
            if "eval_loss" in entry  # logged training metrics are means since the last resume
        ]
    return None if path.name in RUNS_OWN else path.read_bytes()


def same(first: Any, second: Any) -> bool:
    """Return whether two nested structures of tensors, arrays and numbers are equal bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(np.all(first == second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--quick", action="store_true", help="three kills, to try the script")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_and_resume(
            Path(folder), 3 if args.quick else args.kills, args.seed, lambda kill: print(kill, flush=True)
        )
    columns = ["kill", "aimed at", "hit", "steps done", "last whole checkpoint", "steps lost"]
    table = [
        [str(number), kill.aim, kill.phase, kill.step, kill.whole_step or "none yet", kill.lost]
        for number, kill in enumerate(outcome.kills, start=1)
    ]
    print(format_table(columns, table))
    print(f"{outcome.looks_in_vain} of {outcome.looks:,} checks after the first checkpoint found no whole checkpoint.")
    print(f"Files that differ from the uninterrupted run: {', '.join(outcome.different) or 'none'}.")
    if args.json is not None:
        write_json(args.json, {**asdict(outcome), "passed": outcome.passed})
    if not outcome.passed:
        sys.exit("Failed: a whole checkpoint was missing, or files differ from the uninterrupted run.")


if __name__ == "__main__":
    main()
