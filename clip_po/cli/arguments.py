"""Arguments shared by the commands, and the task saved with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import ProcessorMixin
from transformers.utils import logging
from trl import ScriptArguments

from clip_po.bounded_text import parse_json, parse_yaml
from clip_po.cli.idle_flags import check_task_flags
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.words import EVERYDAY_WORDS, spelling
from clip_po.data.class_labels import align_labels, encode_labels, readable_names
from clip_po.data.class_positions import shortened
from clip_po.data.loading import load_split
from clip_po.models import crop_side, image_size
from clip_po.validation import COUNT, check_number, check_templates

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATE = "a photo of a {}"

CLASSES, EVERYDAY = "classes", "everyday"
"""Values of --attack_words: the class names, and the class names and everyday nouns together."""

EVERYDAY_SHARE = 0.5
"""Share of the everyday nouns then, unless --attack_other_share sets another."""

TASK_FILE = "clip_po_task.json"
"""Name of the file in a checkpoint with the class names and prompt template of its training."""


@dataclass
class TaskArguments(ScriptArguments):
    """Arguments for labelled images, their class names and the attack on them."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "The images: a Hub id, a folder (train/<class>/*.jpg), or a CSV, JSON or Parquet file."},
    )

    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of classes."})
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the classes, in the order of the labels. Default: the names in the dataset."},
    )
    name_until: str | None = field(
        default=None,
        metadata={
            "help": "Text at which to cut the dataset's class names: a comma for lists of synonyms, as in ImageNet."
        },
    )
    class_name_map: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON file that renames classes of the dataset, such as {n02099601: golden retriever}."
        },
    )
    prompt_template: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompt of a class, with {} for its name. Default: the checkpoint's, else 'a photo of a {}'. "
            "Several are an ensemble, for evaluate: their embeddings are averaged."
        },
    )
    attack_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Words to write on images. classes: the class names; everyday: these and 173 everyday nouns. "
            "Default: classes."
        },
    )
    attack_other_words: list[str] | None = field(
        default=None,
        metadata={"help": "Words that are not classes, for attack_other_share. Default: 173 everyday nouns."},
    )
    attack_other_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the written words to draw from attack_other_words, 0 to 1. Default: 0.5 with everyday, "
            "else 0."
        },
    )
    attack_count: list[int] = field(
        default_factory=lambda: list(TypographicAttack.count),
        metadata={"help": "Lowest and highest number of words on an image."},
    )
    attack_fonts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Font files, or pillow for Pillow's own font. By default train and evaluate use different fonts."
        },
    )
    attack_size: list[float] = field(
        default_factory=lambda: list(TypographicAttack.size),
        metadata={"help": "Lowest and highest font size as a share of the image's short side."},
    )
    attack_places: list[str] = field(
        default_factory=lambda: list(TypographicAttack.places),
        metadata={
            "help": "Positions of words: anywhere, center, top, left, right, bottom, or a corner such as bottom-left."
        },
    )
    attack_rotation: list[float] = field(
        default_factory=lambda: list(TypographicAttack.rotation),
        metadata={"help": "Lowest and highest angle in degrees."},
    )
    attack_sticker: float = field(
        default=TypographicAttack.sticker, metadata={"help": "Share of words on a sticker, 0 to 1."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Maximum number of rows to use, drawn at random."})

    def __post_init__(self) -> None:
        """Raise if arguments can't work, before anything is loaded."""
        if self.dataset_name is None:
            raise ValueError("--dataset_name is missing. Give a Hub id or a folder of labelled images.")
        self.check()

    def check(self) -> None:
        """Raise if arguments can't work whatever the data are: numbers, prompts, the attack, or streaming."""
        if isinstance(self.prompt_template, str):  # in a recipe
            self.prompt_template = [self.prompt_template]
        if isinstance(self.attack_words, str):
            self.attack_words = [self.attack_words]
        if self.prompt_template is not None:
            check_templates(self.prompt_template, "--prompt_template")
        for name in ("attack_size", "attack_rotation", "attack_count"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"--{name} takes two numbers, the lowest and the highest, got {getattr(self, name)}.")
        if self.max_samples is not None:
            check_number("--max_samples", self.max_samples, COUNT)
        check_task_flags(self)
        self._attack([f"class {number}" for number in range(1000)], ["pillow"])  # checks its arguments
        if self.dataset_streaming:
            raise ValueError(
                "--dataset_streaming is not supported by the commands. Leave it out, or train from Python on a "
                "TypographicStream (docs/quickstart.md, Streamed data)."
            )

    def load(self, split: str, seed: int, like: Dataset | None = None) -> Dataset:
        """Load a split of labelled images, with at most `max_samples` rows.

        Args:
            split: Name of the split.
            seed: Seed that draws the rows.
            like: Another split, whose classes the labels get in its order: splits in folders of their own may list
                their classes otherwise.

        Returns:
            The rows.

        Raises:
            ValueError: If the split is empty, or has a class that `like` does not have.
        """
        return self.labelled(self.read(split), split, seed, like)

    def read(self, split: str) -> Dataset:
        """Read a split of the dataset, whatever its columns.

        Args:
            split: Name of the split.

        Returns:
            All of its rows.

        Raises:
            ValueError: If the split is empty, or as for `load_split`.
        """
        dataset = load_split(str(self.dataset_name), split, self.dataset_config, self.image_column)
        if len(dataset) == 0:
            raise ValueError(f"The split {split!r} of {self.dataset_name!r} is empty. Give one with images.")
        return dataset

    def sample(self, dataset: Dataset, seed: int) -> Dataset:
        """Return at most `max_samples` rows.

        Args:
            dataset: The rows.
            seed: Seed that draws them.

        Returns:
            The rows, in random order if some are left out.
        """
        if self.max_samples is None or self.max_samples >= len(dataset):
            return dataset
        return dataset.shuffle(seed=seed).select(range(self.max_samples))

    def labelled(self, dataset: Dataset, split: str, seed: int, like: Dataset | None = None) -> Dataset:
        """Return rows that were read as labelled images, with at most `max_samples` rows.

        Args:
            dataset: Rows of `read`.
            split: As for `load`.
            seed: As for `load`.
            like: As for `load`.

        Returns:
            As for `load`.

        Raises:
            ValueError: If the rows have a class that `like` does not have.
        """
        dataset = encode_labels(dataset, self.label_column, self.class_names)
        if like is not None and (names := self.dataset_names(like)) is not None:
            dataset = align_labels(dataset, self.label_column, names, split)
        return self.sample(dataset, seed)

    def names(self, dataset: Dataset, task: Task | None = None) -> list[str]:
        """Return `class_names`, else the checkpoint's if it knows the dataset's classes, else the dataset's.

        Args:
            dataset: One split.
            task: The task of the checkpoint; None if there is none.

        Returns:
            One name for each class, in the order of the dataset's labels.

        Raises:
            ValueError: If there are no class names in any of them.
        """
        known = self.dataset_names(dataset)
        if self.class_names is not None:
            return self.class_names
        if task is not None and known is None:
            return list(task.class_names)
        if task is not None and known is not None and self.class_name_map is None and self.name_until is None:
            if (names := task.names_of(known)) is not None:
                return names
            logger.warning(
                f"The checkpoint was aligned on the classes {shortened(task.class_names)}. {self.dataset_name!r} has "
                f"others, {shortened(known)}, which are used here."
            )
        if known is not None:
            renamed = None if self.class_name_map is None else read_mapping(self.class_name_map, "--class_name_map")
            return readable_names(known, self.name_until, renamed)
        raise ValueError(
            f"The column {self.label_column!r} is {dataset.features.get(self.label_column)}, which has no class names "
            f"(columns: {dataset.column_names}). Give --class_names, one for each label, or --label_column."
        )

    def templates(self, task: Task | None = None) -> list[str]:
        """Return the prompts: as given, else the one of the checkpoint, else `DEFAULT_TEMPLATE`.

        Args:
            task: The task of the checkpoint; None if there is none.

        Returns:
            One or more prompts with one `{}`.
        """
        return self.prompt_template or [DEFAULT_TEMPLATE if task is None else task.prompt_template]

    def check_single_prompt(self) -> None:
        """Raise if there are several prompts: a preference in training is between two texts, not between averages."""
        if self.prompt_template is not None and len(self.prompt_template) > 1:
            raise ValueError(
                f"--prompt_template has {len(self.prompt_template)} prompts, but training uses one. Give one here. "
                "clip-po evaluate averages the embeddings of several."
            )

    def dataset_names(self, dataset: Dataset) -> list[str] | None:
        """Return the class names as the dataset has them; None if its labels have none."""
        feature = dataset.features.get(self.label_column)
        return feature.names if isinstance(feature, ClassLabel) else None

    def attack(
        self, words: Sequence[str], fonts: Sequence[str], processor: ProcessorMixin, seed: int
    ) -> TypographicAttack:
        """Return the typographic attack that the arguments describe, on the part of an image that the model sees."""
        return self._attack(words, fonts, min_side=image_size(processor) or 224, crop=crop_side(processor), seed=seed)

    @property
    def other_share(self) -> float:
        """The share of the written words that are not classes."""
        if self.attack_other_share is not None:
            return self.attack_other_share
        return EVERYDAY_SHARE if self.attack_words == [EVERYDAY] else 0.0

    def _attack(self, words: Sequence[str], fonts: Sequence[str], **fitted: Any) -> TypographicAttack:
        low, high = self.attack_size
        named = self.attack_words in (None, [CLASSES], [EVERYDAY])
        return TypographicAttack(
            words=list(words) if named else self.attack_words or (),
            other_words=self.attack_other_words or EVERYDAY_WORDS,
            other_share=self.other_share,
            count=(self.attack_count[0], self.attack_count[1]),
            fonts=self.attack_fonts or list(fonts),
            size=(low, high),
            places=self.attack_places,
            rotation=(self.attack_rotation[0], self.attack_rotation[1]),
            sticker=self.attack_sticker,
            **fitted,
        )


@dataclass(frozen=True)
class Task:
    """Class names and prompt template of a checkpoint, saved in its folder.

    Attributes:
        class_names: Names of the classes in training.
        prompt_template: Prompt of a class, with `{}` for its name.
        dataset_names: What the dataset called these classes, if its names were replaced; else None.
    """

    class_names: Sequence[str]
    prompt_template: str
    dataset_names: Sequence[str] | None = None

    @classmethod
    def of(cls, class_names: Sequence[str], prompt_template: str, dataset_names: Sequence[str] | None) -> Task:
        """Return the task of a training on a dataset.

        Args:
            class_names: As for `Task`.
            prompt_template: As for `Task`.
            dataset_names: The class names of the dataset, in the same order; None if it has none.

        Returns:
            The task, which keeps the names of the dataset only if they were replaced by others.
        """
        replaced = dataset_names is not None and [*map(spelling, dataset_names)] != [*map(spelling, class_names)]
        return cls(class_names, prompt_template, dataset_names if replaced else None)

    def names_of(self, known: Sequence[str]) -> list[str] | None:
        """Return the names of this task for the classes of a dataset.

        Args:
            known: The class names of the dataset.

        Returns:
            The names in the order of `known`; None if a class of the dataset is not one of this task.
        """
        called = {spelling(name): name for name in self.class_names}
        called |= {spelling(n): c for n, c in zip(self.dataset_names or (), self.class_names, strict=False)}
        names = [called[name] for name in map(spelling, known) if name in called]
        return names if len(names) == len(known) else None

    def save(self, folder: str | Path) -> None:
        """Write the task into the folder of a checkpoint."""
        Path(folder, TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Task | None:
        """Read the task from a checkpoint's folder, its parent folder or the Hub. None if there is no task.

        Raises:
            ValueError: If the file is damaged.
        """
        file = next((f for f in (Path(folder, TASK_FILE), Path(folder).parent / TASK_FILE) if f.is_file()), None)
        if file is None and not Path(folder).exists():
            try:
                file = Path(hf_hub_download(str(folder), TASK_FILE))
            except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
                return None
        if file is None:
            return None
        try:
            found: dict[str, Any] = parse_json(file.read_text())
            return cls(
                class_names=list(found["class_names"]),
                prompt_template=str(found["prompt_template"]),
                dataset_names=None if (names := found.get("dataset_names")) is None else list(names),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} does not contain class_names and prompt_template as JSON ({type(error).__name__}: "
                f"{error}). Delete it and give --class_names and --prompt_template, or save the model again."
            ) from error


def read_mapping(file: str, flag: str = "--config") -> dict[str, Any]:
    """Read a YAML or JSON file that maps names to values.

    Args:
        file: The file.
        flag: The flag that names it, for messages.

    Returns:
        The values by name; empty for an empty file.

    Raises:
        ValueError: If the file is not YAML, or not a mapping.
        OSError: If the file can't be read.
    """
    with open(file, encoding="utf-8") as stream:
        try:
            found = parse_yaml(stream.read())
        except ValueError as error:
            raise ValueError(f"{flag} {file!r} is not a YAML file ({error}). Fix its syntax.") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{flag} {file!r} must map names to values, such as beta: 0.1, got {found!r}.")
    return found or {}
