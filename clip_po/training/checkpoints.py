"""Whole checkpoints: each is marked once everything is written, and only then are older ones deleted."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from clip_po.hub.publishing import push_checkpoint

MARK = "checkpoint.complete"
"""Name of an empty file in a checkpoint. It is written last and says that the checkpoint is whole."""

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder that Trainer gives the checkpoint of the current step.

    Args:
        args: Arguments of the trainer.
        state: State of the trainer.

    Returns:
        `output_dir/checkpoint-<global_step>`.
    """
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def checkpoint_format(folder: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Return how to write a model that Trainer loads again, to resume or as the best one.

    transformers writes some models, such as `VisionTextDualEncoderModel`, under the names of their first checkpoints.
    `from_pretrained` knows both names, but Trainer takes those in the file as they are, and skips unknown ones.

    Args:
        folder: Where the model is written.
        model: The model.

    Returns:
        Arguments of `PreTrainedModel.save_pretrained` for a checkpoint of a plain model. Empty for adapters and
        transformations, and for a final model, which older releases of transformers can read.
    """
    is_checkpoint = Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    return {"save_original_format": False} if is_checkpoint and isinstance(model, PreTrainedModel) else {}


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Return whether everything in a checkpoint was written.

    Args:
        folder: The checkpoint. It need not exist.

    Returns:
        Whether it has the file `checkpoint.complete`.
    """
    return Path(folder, MARK).is_file()


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the whole checkpoint with the highest step in a folder.

    Args:
        output_dir: Output folder of a run. It need not exist.

    Returns:
        Path of the checkpoint, or None if there is none.
    """
    whole = [(step, path) for step, path in numbered(Path(output_dir)) if is_whole(path)]
    return str(max(whole)[1]) if whole else None


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return every checkpoint in an output folder, whole or not.

    Args:
        folder: The output folder.

    Returns:
        Step and folder of each, in no order.
    """
    return [(int(m[1]), path) for path in folder.glob("*") if (m := _NUMBERED.fullmatch(path.name))]


def whole_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the checkpoint to resume from. A partly written checkpoint is never used.

    Args:
        resume_from_checkpoint: As in `Trainer.train`: a folder, True for the last checkpoint in `output_dir`, or None.
        output_dir: Output folder of the run.

    Returns:
        The folder, or None for a new run.

    Raises:
        ValueError: If there is no whole checkpoint. The message says what there is and what to do.
    """
    if not resume_from_checkpoint:
        return None
    last = last_whole_checkpoint(output_dir)
    if resume_from_checkpoint is True:
        if last is None:
            raise ValueError(
                f"There is no whole checkpoint in {output_dir!r} to resume from. Leave resume_from_checkpoint out to "
                "start a new run."
            )
        return last
    if not is_whole(resume_from_checkpoint):
        problem = "does not exist"
        if Path(resume_from_checkpoint).is_dir():
            problem = f"has no {MARK}: saving was cut off"
        instead = f"The last whole checkpoint is {last!r}." if last else "There is no other checkpoint."
        raise ValueError(
            f"The checkpoint {resume_from_checkpoint!r} {problem}. {instead} (To resume from a whole checkpoint that "
            f"another program wrote, add an empty file {MARK} to it.)"
        )
    return str(resume_from_checkpoint)


def check_best_metric(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raise if the metric that chooses the best checkpoint will not exist, before training instead of after an epoch.

    Args:
        args: Arguments of the trainer.
        eval_dataset: Its evaluation data: several by name, or anything else.

    Raises:
        ValueError: If there are several evaluation data sets and the metric is that of none.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if not args.load_best_model_at_end or not isinstance(eval_dataset, dict):
        return
    if not any(metric.startswith(f"{name}_") for name in eval_dataset):
        names = [f"eval_{name}_loss" for name in eval_dataset]
        raise ValueError(
            f"load_best_model_at_end=True with metric_for_best_model={args.metric_for_best_model!r}, but each of the "
            f"evaluation data sets {list(eval_dataset)} has metrics of its own. Set metric_for_best_model to one of "
            f"them, such as {names[0]!r}."
        )


class SavingError(OSError):
    """Saving failed. The message says where, why, and which checkpoint is left."""


@contextlib.contextmanager
def saving(folder: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of a full or broken disk into one error that says what to do.

    Args:
        folder: File or folder that is written.
        output_dir: Output folder of the run, with its checkpoints.

    Yields:
        Nothing.

    Raises:
        SavingError: If writing fails. Errors of the Hub, and errors that are neither an OSError nor raised by
            safetensors or `torch.save`, are passed on unchanged.
    """
    try:
        yield
    except (SavingError, HfHubHTTPError):  # a failed push is an OSError too
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # the error of torch.save
            raise
        free = ""
        with contextlib.suppress(OSError):
            free = f" The disk has {shutil.disk_usage(output_dir).free / 2**20:,.0f} MiB free."
        last = last_whole_checkpoint(output_dir)
        left = f"The last whole checkpoint is {last!r}" if last else "There is no whole checkpoint yet"
        again = "resume with resume_from_checkpoint=True" if last else "start a new run"
        raise SavingError(
            f"Saving {str(folder)!r} failed ({type(error).__name__}: {error}).{free} {left}. Free some space or fix "
            f"the disk, set save_total_limit to keep fewer checkpoints, and {again}."
        ) from error


class CheckpointCallback(TrainerCallback):
    """Marks a checkpoint as whole once every process and callback has written its part, then rotates and pushes.

    Trainer deletes and pushes checkpoints before callbacks have written their part. The callback withholds
    `save_total_limit` and `hub_strategy` from Trainer where it reads them, and applies them itself, after the mark.

    Args:
        trainer: The trainer. The callback moves itself to the end of the trainer's callbacks when training starts,
            because what the other callbacks write belongs to the checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.withheld: dict[str, Any] = {}
        self._saved_step: int | None = None
        self._is_new = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Become the last callback.

        Args:
            args: `output_dir` and `resume_from_checkpoint`.
            state: The step. A checkpoint of this step that training resumes from counts as saved.
            control: Not used.
            **kwargs: Not used.
        """
        handler = self.trainer.callback_handler
        handler.callbacks = [*(callback for callback in handler.callbacks if callback is not self), self]
        resumed = args.resume_from_checkpoint
        # A finished run may be resumed. Saving its last checkpoint again would leave a moment without any.
        same = bool(resumed) and Path(str(resumed)).resolve() == checkpoint_folder(args, state).resolve()
        self._saved_step = state.global_step if same else None

    def withhold(self, args: TrainingArguments) -> None:
        """Keep Trainer from deleting and pushing checkpoints until `release`.

        Args:
            args: `save_total_limit` and `hub_strategy` are replaced. A second call changes nothing.
        """
        if not self.withheld:
            self.withheld = {"save_total_limit": args.save_total_limit, "hub_strategy": args.hub_strategy}
            args.save_total_limit, args.hub_strategy = None, HubStrategy.END

    def release(self, args: TrainingArguments) -> None:
        """Give the withheld arguments back.

        Args:
            args: The arguments that `withhold` changed. Nothing happens if none are withheld.
        """
        for name, value in self.withheld.items():
            setattr(args, name, value)
        self.withheld = {}

    def is_saved(self, state: TrainerState) -> bool:
        """Return whether the checkpoint of this step exists, for instance because a signal came right after it.

        Args:
            state: The step.

        Returns:
            True if this run saved the checkpoint of the step, or resumed from it.
        """
        return self._saved_step == state.global_step

    @contextlib.contextmanager
    def writing(self, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
        """Prepare the folder of a checkpoint, and explain errors of the disk while it is written.

        Args:
            args: `output_dir`. What an earlier run left in the folder of the checkpoint is deleted.
            state: The step. Every process must use the context.

        Yields:
            Nothing.

        Raises:
            SavingError: If writing fails.
        """
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            delete_checkpoint(folder)
        self.trainer.accelerator.wait_for_everyone()
        self.withhold(args)
        try:
            with saving(folder, str(args.output_dir)):
                yield
        finally:
            self.release(args)
        self._saved_step, self._is_new = state.global_step, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint, push it, and delete checkpoints over the limit.

        Args:
            args: `output_dir`, `save_total_limit`, `push_to_hub` and `hub_strategy`.
            state: The step, and the best checkpoint, which is never deleted.
            control: Not used.
            **kwargs: Not used.

        Raises:
            SavingError: If the files can't be flushed or the mark can't be written.
        """
        self.trainer.accelerator.wait_for_everyone()
        folder = checkpoint_folder(args, state)
        if args.should_save:
            with saving(folder, str(args.output_dir)):
                for path in (*folder.rglob("*"), folder):
                    _flush(path)
                Path(folder, MARK).touch()
                _flush(folder)
                _flush(folder.parent)
        is_new, self._is_new = self._is_new, False
        if is_new and args.push_to_hub and args.hub_strategy != HubStrategy.END:
            push_checkpoint(self.trainer, folder, args.hub_strategy)
        if args.should_save and args.save_total_limit is not None and args.save_total_limit > 0:
            kept = {folder, *([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])}
            _rotate(folder.parent, args.save_total_limit, kept)


def _rotate(output_dir: Path, limit: int, kept: set[Path]) -> None:
    """Delete checkpoints over the limit: first the partly written ones, then those that were marked earliest.

    The number of the step does not tell the age: an earlier run may have left higher numbers.
    """
    checkpoints = [path for _, path in sorted(numbered(output_dir))]
    checkpoints.sort(key=lambda path: (is_whole(path), (path / MARK if is_whole(path) else path).stat().st_mtime_ns))
    over = len(checkpoints) - max(limit, len(kept.intersection(checkpoints)))
    for path in [path for path in checkpoints if path not in kept][: max(0, over)]:
        delete_checkpoint(path)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. Its mark goes first: cut off here, the checkpoint does not count as whole.

    Args:
        folder: Folder of the checkpoint.
    """
    Path(folder, MARK).unlink(missing_ok=True)
    _flush(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Not every system can flush folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
