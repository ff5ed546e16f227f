"""What a run consists of besides its weights: data, candidate texts, reference and settings, kept with checkpoints.

`Trainer` resumes with other data or another loss and says nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from clip_po.data.embedding_cache import fingerprint, model_digest
from clip_po.data.generic_images import MixedPreferences
from clip_po.data.grades import GRADES
from clip_po.data.pairs import PreferencePairs
from clip_po.data.row_completion import regularization_image
from clip_po.data.rows import is_transformed
from clip_po.data.typographic_preferences import AttackedClasses, TypographicPreferences
from clip_po.training.checkpoints import checkpoint_folder, saving
from clip_po.training.random_state import unchanged_random_state
from clip_po.validation import UnreadableImage

if TYPE_CHECKING:
    from clip_po.config import ContrastivePOConfig
    from clip_po.trainer import ContrastivePOTrainer

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
"""In a checkpoint: what the run that wrote it consists of."""

COMPARED_ROWS = 256
"""Number of rows of a dataset, evenly spread, whose texts and pixels are compared."""

TRAINER_SETTINGS = (
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
)
"""Arguments of `transformers.TrainingArguments` that define a run. Its length does not: a run may go on for longer."""

OTHER_SETTINGS = frozenset(
    {
        "model_init_kwargs",
        "base_model_id",
        "on_bad_image",
        "precompute_ref_log_probs",
        "embeddings_cache",
        "tower_chunk_size",
        "overwrite_output_dir",
        "ignore_run_differences",
    }
)
"""Arguments of this package's configurations that don't define a run. All others do."""

LATER_COLUMNS = (*GRADES, "text", "desirable")
"""Columns of rows that not all runs have."""


def settings_of(args: ContrastivePOConfig) -> dict[str, Any]:
    """Return the settings that define a run.

    Args:
        args: The configuration, of this class or a subclass.

    Returns:
        Values by name of the argument, and the number of rows in an optimizer step.
    """
    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field.name for field in dataclasses.fields(args) if field.name not in general | OTHER_SETTINGS]
    values = args.to_dict()
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**{name: values.get(name) for name in (*own, *TRAINER_SETTINGS)}, "rows in a step": step}


def content_of(pairs: Any) -> dict[str, Any]:
    """Return what preferences consist of, for comparison.

    Args:
        pairs: `PreferencePairs` or `StreamedPairs`. The rows of a stream are compared as it is read on.

    Returns:
        Numbers, class names and digests by what they are of. Rows that a transform of the user changes are counted but
        not read.
    """
    preferences, images = pairs.preferences, pairs.completion.regularization
    found: dict[str, Any] = {}
    task = preferences.task if isinstance(preferences, MixedPreferences) else preferences
    if isinstance(task, AttackedClasses):
        found |= {"class names": list(task.class_names), "prompt template": task.template}
        found |= {"choice of rejected texts": task.rejected, "attack": fingerprint(repr(task.attack))}
    if isinstance(task, TypographicPreferences):
        found["labels and weights"] = fingerprint(repr((task.labels, task.weights)))
    if isinstance(pairs, PreferencePairs):
        found |= {"columns": sorted(preferences.column_names), "number of rows": len(preferences)}
        if not preferences.transformed:
            found |= _rows_of(pairs)
    if isinstance(images, Dataset):
        found["number of regularization images"] = len(images)
        if not is_transformed(images):
            found["regularization images"] = fingerprint(*_regularization_digests(images))
    return {f"{pairs.name}: {name}": value for name, value in found.items()}


def _rows_of(pairs: PreferencePairs) -> dict[str, str]:
    """Return digests of the texts and of the images of compared rows, as they are in epoch 0."""
    texts, images = [], []
    for index in _spread(len(pairs)):
        try:
            row = pairs.preferences.row(index, 0)
        except UnreadableImage:
            row = pairs.preferences.texts(index, 0)
        graded = [row[name] for name in LATER_COLUMNS if name in row]  # other runs compare as before there were any
        texts.append(repr([row.get(name) for name in ("chosen", "rejected", "candidates", "weight")] + graded))
        images += [_pixels(row[name]) if name in row else "" for name in ("image", "clean_image")]
        images += map(_pixels, row.get("images", []))
    return {"texts of its rows": fingerprint(*texts), "images of its rows": fingerprint(*images)}


def _regularization_digests(images: Dataset) -> Iterator[str]:
    for index in _spread(len(images)):
        try:
            yield _pixels(regularization_image(images, index))
        except UnreadableImage:
            yield ""


def _spread(count: int) -> list[int]:
    """Return the numbers of the compared ones of `count` rows: all, or the first, the last and others between."""
    if count <= COMPARED_ROWS:
        return list(range(count))
    return [number * (count - 1) // (COMPARED_ROWS - 1) for number in range(COMPARED_ROWS)]


def _pixels(image: Any) -> str:
    return f"{image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what differs between two runs.

    Args:
        before: Of the run that wrote a checkpoint, by name.
        now: Of this run.

    Returns:
        A clause for each difference, such as "beta was 0.1 and is 0.5". What only one of them names is left out:
        another version of this package wrote it.
    """
    names = [name for name in now if name in before and before[name] != now[name]]
    return [_difference(name, before[name], now[name]) for name in names]


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        entries = enumerate(itertools.zip_longest(map(repr, before), map(repr, now), fillvalue="absent"))
        first, (old, new) = next((number, entry) for number, entry in entries if entry[0] != entry[1])
        return f"{name}: entry {first} was {old} and is {new}"
    if _is_digest(before) and _is_digest(now):
        return f"{name} differ" if name.endswith("s") else f"{name} differs"
    return f"{name} was {before!r} and is {now!r}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _identity_of(trainer: ContrastivePOTrainer) -> dict[str, Any]:
    texts = trainer.candidates.texts
    found = {
        **settings_of(trainer.args),
        "candidate_texts": None if texts is None else list(texts),
        "reference model": model_digest(trainer.reference.initial_model),
        **content_of(trainer.train_dataset),
    }
    if trainer.args.load_best_model_at_end:  # the evaluation then decides which weights a run ends with
        sets = trainer.eval_dataset
        for pairs in sets.values() if isinstance(sets, dict) else (sets,):
            found |= content_of(pairs)
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


class RunIdentityCallback(TrainerCallback):
    """Saves with every checkpoint what its run consists of, and compares it when training resumes.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: ContrastivePOTrainer) -> None:
        self.trainer = trainer
        self._known: dict[str, Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What this run consists of, by name. Computed once for each training."""
        if self._known is None:
            with unchanged_random_state(self.trainer.accelerator.device):
                self._known = _identity_of(self.trainer)
        return self._known

    def check(self, folder: str) -> None:
        """Raise if a checkpoint was written by another run, unless the arguments say that differences are ignored.

        Args:
            folder: The checkpoint. One without a `RUN_FILE`, such as of another program, is not compared.

        Raises:
            ValueError: If data, candidate texts, reference or settings differ. The message names each difference.
        """
        file = Path(folder, RUN_FILE)
        if not file.is_file():
            logger.warning(f"The checkpoint {folder!r} has no {RUN_FILE}, so its data and settings can't be compared.")
            return
        found = differences(json.loads(file.read_text()), self.identity)
        if self.trainer.args.ignore_data_skip:  # which says that training goes on with other rows
            found = [difference for difference in found if not difference.startswith("train_dataset: ")]
        if found and self.trainer.args.ignore_run_differences:
            logger.warning(f"Training resumes from {folder!r} in spite of differences: {'; '.join(found)}.")
        elif found:
            raise ValueError(
                f"The checkpoint {folder!r} belongs to another run: {'; '.join(found)}. Resume with the data and the "
                f"arguments of the run that wrote it, or start a new run from its weights, model={folder!r}. To go on "
                "all the same, set ignore_run_differences=True (--ignore_run_differences)."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the run consists of into the checkpoint.

        Args:
            args: `output_dir`. Processes that do not save do nothing.
            state: The step, which names the checkpoint.
            control: Not used.
            **kwargs: Not used.

        Raises:
            SavingError: If the file can't be written.
        """
        if args.should_save:
            file = checkpoint_folder(args, state) / RUN_FILE
            text = json.dumps(self.identity, indent=2)
            with saving(file, str(args.output_dir)):
                file.write_text(text + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the run: arguments may change before the next one.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        self._known = None
