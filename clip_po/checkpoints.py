"""Checkpoints that are whole: marked when everything is written, before older ones are deleted."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

MARK = "checkpoint.complete"
"""An empty file in a checkpoint, the last to be written."""

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end."""
    return Path(folder, MARK).is_file()


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint of the highest step in a folder among those that are whole; None where there is none."""
    whole = [(step, path) for step, path in _numbered(Path(output_dir)) if is_whole(path)]
    return str(max(whole)[1]) if whole else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of checkpoints, whole or not."""
    return [(int(m[1]), path) for path in folder.glob("*") if (m := _NUMBERED.fullmatch(path.name))]


def whole_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to resume from; a half-written one is never taken.

    Args:
        resume_from_checkpoint: As for `Trainer.train`: a folder, True for the last one in `output_dir`, or nothing.
        output_dir: Where the run writes.

    Returns:
        The folder, or None where training starts anew.

    Raises:
        ValueError: There is no whole checkpoint; the message says what there is and what to do.
    """
    if not resume_from_checkpoint:
        return None
    last = last_whole_checkpoint(output_dir)
    if resume_from_checkpoint is True:
        if last is None:
            raise ValueError(
                f"There is no whole checkpoint in {output_dir!r} to resume from: none was written to its end. Leave "
                "resume_from_checkpoint out to start anew."
            )
        return last
    if not is_whole(resume_from_checkpoint):
        there = "is not there" if not Path(resume_from_checkpoint).is_dir() else f"has no {MARK}: it was cut off"
        instead = f"The last whole one is {last!r}." if last else "There is no other."
        raise ValueError(
            f"The checkpoint {resume_from_checkpoint!r} {there}. {instead} (To resume from one that another program "
            f"wrote and that you know to be whole, put an empty file {MARK} in it.)"
        )
    return str(resume_from_checkpoint)


class WholeCheckpoints(_Base):
    """What a trainer does so that a checkpoint counts only when it is whole.

    Trainer deletes older checkpoints before its callbacks have written their part. Its method that writes one is
    replaced so that nothing is deleted there; `CheckpointMark` does it.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and folder.is_dir():
            Path(folder, MARK).unlink(missing_ok=True)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit


class CheckpointMark(TrainerCallback):
    """Marks a checkpoint when all processes and callbacks have written it, then deletes those over the limit.

    Args:
        wait_for_everyone: A barrier of all processes, such as `accelerator.wait_for_everyone`.
        callbacks: The trainer's callback handler, in which the mark is to come last.
    """

    def __init__(self, wait_for_everyone: Any, callbacks: Any) -> None:
        self._wait, self._handler = wait_for_everyone, callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come after callbacks that were added later: what they write belongs to the checkpoint."""
        others = [callback for callback in self._handler.callbacks if callback is not self]
        self._handler.callbacks = [*others, self]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark first, then delete."""
        self._wait()
        if not args.should_save:
            return
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        for file in folder.rglob("*"):
            if file.is_file():
                _flush(file)
        Path(folder, MARK).touch()
        _flush(folder)
        for step, path in _numbered(folder.parent):
            if step > state.global_step and not is_whole(path):  # of a run that was killed while it wrote
                shutil.rmtree(path)
        rotate_checkpoints(
            output_dir=str(args.output_dir),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,  # an earlier run may have left higher numbers
        )


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
