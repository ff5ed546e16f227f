"""Checkpoints that are whole: marked when everything is written, before older ones are deleted."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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


class SavingError(OSError):
    """Something could not be written to its end; the message says where, why, and what is left."""


@contextlib.contextmanager
def saving(folder: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what writers raise on a full or broken disk into one error that says what to do.

    Args:
        folder: What is written.
        output_dir: Where the run's checkpoints lie.

    Raises:
        SavingError: It could not be written.
    """
    try:
        yield
    except (SavingError, HfHubHTTPError):  # the latter of a push, which is an OSError too
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # as torch.save says it
            raise
        free = ""
        with contextlib.suppress(OSError):
            free = f" {shutil.disk_usage(output_dir).free / 2**20:,.0f} MiB are free there."
        last = last_whole_checkpoint(output_dir)
        left = f"The last whole checkpoint is {last!r}" if last else "There is no whole checkpoint yet"
        again = "resume with resume_from_checkpoint=True" if last else "start again"
        raise SavingError(
            f"{str(folder)!r} could not be written to its end ({type(error).__name__}: {error}).{free} {left}. Make "
            f"room or mend the disk, set save_total_limit to keep less, and {again}."
        ) from error


class WholeCheckpoints(_Base):
    """What a trainer does so that a checkpoint counts only when it is whole.

    Trainer deletes older checkpoints before its callbacks have written their part, and the last one in the end. Its
    methods that do so are replaced so that nothing is deleted there; `CheckpointMark` does it.
    """

    _saved_step: int | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a disk that is full or broken ends in a `SavingError`."""
        with saving(output_dir or str(self.args.output_dir), str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self._saved_step == self.state.global_step:
            return  # by a signal or a callback, right after it was saved: while it is written again, there is none
        given = self.args.resume_from_checkpoint
        if given and Path(given).resolve() == folder.resolve():
            return  # a finished run was resumed: while the same is written again, there would be none
        if self.args.should_save and folder.is_dir():
            _delete(folder)
        self.accelerator.wait_for_everyone()
        with saving(folder, str(self.args.output_dir)), _deleting_nothing(self.args):
            super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step
        if not self.control.should_save:  # not called by the loop, which asks callbacks next, but on a signal
            self.callback_handler.on_save(self.args, self.state, self.control)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`."""
        self._saved_step = None
        return super().train(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer would now delete the last checkpoint where another one is the best, and a finished run could not be
        # told from one that was killed.
        with _deleting_nothing(self.args):
            return super()._finalize_training(*args, **kwargs)


@contextlib.contextmanager
def _deleting_nothing(args: TrainingArguments) -> Iterator[None]:
    """Keep Trainer from deleting checkpoints, which it does with their marks in them, in any order."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


class CheckpointMark(TrainerCallback):
    """Marks a checkpoint when all processes and callbacks have written it, then deletes those over the limit.

    Args:
        wait_for_everyone: A barrier of all processes, such as `accelerator.wait_for_everyone`.
        callbacks: The trainer's callback handler, in which the mark is to come last.
        publish: Called in every process once the checkpoint is whole, before others are deleted.
    """

    def __init__(
        self, wait_for_everyone: Callable[[], None], callbacks: CallbackHandler, publish: Callable[[], None]
    ) -> None:
        self._wait, self._handler, self._publish = wait_for_everyone, callbacks, publish

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come after callbacks that were added later: what they write belongs to the checkpoint."""
        others = [callback for callback in self._handler.callbacks if callback is not self]
        self._handler.callbacks = [*others, self]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark first, then delete."""
        self._wait()
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save:
            with saving(folder, str(args.output_dir)):
                for path in (*folder.rglob("*"), folder):
                    _flush(path)
                Path(folder, MARK).touch()
                _flush(folder)
                _flush(folder.parent)
        self._publish()
        if args.should_save and args.save_total_limit is not None and args.save_total_limit > 0:
            kept = {folder, *([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])}
            _rotate(folder.parent, args.save_total_limit, kept)


def _rotate(output_dir: Path, limit: int, kept: set[Path]) -> None:
    """Delete checkpoints over the limit: first those that are not whole, then those marked the longest time ago.

    The number of the step says nothing of the age: an earlier run may have left higher ones.
    """
    checkpoints = [path for _, path in sorted(_numbered(output_dir))]
    checkpoints.sort(key=lambda path: (is_whole(path), (path / MARK if is_whole(path) else path).stat().st_mtime_ns))
    over = len(checkpoints) - max(limit, len(kept.intersection(checkpoints)))
    for path in [path for path in checkpoints if path not in kept][: max(0, over)]:
        _delete(path)


def _delete(folder: Path) -> None:
    """Delete a checkpoint, which is no whole one any more before anything else of it is gone."""
    Path(folder, MARK).unlink(missing_ok=True)
    _flush(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk; not every system can do so for folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
