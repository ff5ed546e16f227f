"""The output folder of a run. What an earlier run left there is replaced only if the arguments say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy

from clip_po.config import ContrastivePOConfig
from clip_po.training.checkpoints import delete_checkpoint, is_whole, numbered


def check_unused(args: ContrastivePOConfig, resumed: str | bool | None, files: Sequence[str] = ()) -> None:
    """Raise if a run would replace what an earlier run left in its output folder.

    Args:
        args: Arguments of the run.
        resumed: The checkpoint that the run resumes from, True for the last one in the output folder, or None. A run
            that goes on in its own folder may replace what is there.
        files: Patterns of files that the run replaces, beside the checkpoints that it deletes if it saves any.

    Raises:
        ValueError: If the folder holds some of them. The message names them and says what to do.
    """
    folder = Path(str(args.output_dir))
    if args.overwrite_output_dir or _goes_on(folder, resumed):
        return
    found = [path.name for pattern in files for path in sorted(folder.glob(pattern))]
    if args.save_strategy != SaveStrategy.NO:
        # Whole, or of another trainer, which leaves no mark but a pickle of its arguments. The rest was cut off.
        found += [p.name for _, p in sorted(numbered(folder)) if is_whole(p) or (p / TRAINING_ARGS_NAME).is_file()]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"output_dir {str(folder)!r} holds {', '.join(found[:3])}{more} of an earlier run, which this run would "
            "replace. Choose another folder, continue the earlier run with resume_from_checkpoint=True "
            "(--resume_from_checkpoint true), or replace it with overwrite_output_dir=True (--overwrite_output_dir)."
        )


def _goes_on(folder: Path, resumed: str | bool | None) -> bool:
    """Return whether a run resumes from a checkpoint of its own output folder."""
    return resumed is True or (bool(resumed) and Path(str(resumed)).resolve().parent == folder.resolve())


class OverwriteCallback(TrainerCallback):
    """Deletes the checkpoints of an earlier run as training starts, if `overwrite_output_dir` says so.

    If they stayed, a later resume would take the one with the highest step, which may be of the earlier run.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete the checkpoints, unless the run resumes from one of them or saves none itself.

        Args:
            args: `output_dir`, `overwrite_output_dir` and what the run saves and resumes from.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        folder, resumed = Path(str(args.output_dir)), args.resume_from_checkpoint
        replaces = args.overwrite_output_dir and args.save_strategy != SaveStrategy.NO
        if args.should_save and replaces and not _goes_on(folder, resumed):
            for _, checkpoint in numbered(folder):
                delete_checkpoint(checkpoint)
