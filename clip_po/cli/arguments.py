"""Arguments that the commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import ProcessorMixin
from trl import ScriptArguments, TrlParser

from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.data.loading import load_split
from clip_po.models import crop_side, image_size

DEFAULT_TEMPLATE = "a photo of a {}"

TASK_FILE = "clip_po_task.json"
"""Beside a checkpoint: the class names and prompt template that it was aligned with."""


@dataclass
class TaskArguments(ScriptArguments):
    """What the images are, what they are called, and what is written on them."""

    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of classes."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes by label; default: those of the data set."}
    )
    name_until: str | None = field(
        default=None,
        metadata={"help": "Cut the data set's class names there: a comma, where they list synonyms as ImageNet's do."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of a class, one {} for its name; default: the checkpoint's, else 'a photo of a {}'."
        },
    )
    attack_words: list[str] | None = field(
        default=None, metadata={"help": "Words that are written on images; default: the class names."}
    )
    attack_other_words: list[str] | None = field(
        default=None,
        metadata={"help": "Words that are no class, for attack_other_share; default: 173 everyday nouns."},
    )
    attack_other_share: float = field(
        default=0.0, metadata={"help": "Share of the written words that are drawn from attack_other_words, 0 to 1."}
    )
    attack_count: list[int] = field(
        default_factory=lambda: list(TypographicAttack.count),
        metadata={"help": "Lowest and highest number of words on an image."},
    )
    attack_fonts: list[str] | None = field(
        default=None,
        metadata={"help": "Font files, or pillow for Pillow's own; evaluate's default fonts are none of train's."},
    )
    attack_size: list[float] = field(
        default_factory=lambda: list(TypographicAttack.size),
        metadata={"help": "Lowest and highest font size as a share of the image's short side."},
    )
    attack_places: list[str] = field(
        default_factory=lambda: list(TypographicAttack.places),
        metadata={
            "help": "Where words stand: anywhere, center, top, left, right, bottom, or a corner as bottom-left."
        },
    )
    attack_rotation: list[float] = field(
        default_factory=lambda: list(TypographicAttack.rotation),
        metadata={"help": "Lowest and highest angle in degrees."},
    )
    attack_sticker: float = field(
        default=TypographicAttack.sticker, metadata={"help": "Share of words on a sticker, 0 to 1."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Use that many rows, drawn at random."})

    def __post_init__(self) -> None:
        """Refuse what can't work before anything is loaded."""
        if self.dataset_name is None:
            raise ValueError("--dataset_name is missing: a Hub id or a folder of labelled images.")
        self.check()

    def check(self) -> None:
        """Refuse numbers that can't work."""
        for name in ("attack_size", "attack_rotation", "attack_count"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"--{name} takes two numbers, the lowest and the highest, got {getattr(self, name)}.")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"--max_samples must be at least 1, got {self.max_samples}.")
        if self.dataset_streaming:
            raise ValueError(
                "--dataset_streaming is not supported by the commands. Leave it out, or train from Python on a "
                "TypographicStream (docs/quickstart.md, Streamed data)."
            )

    def load(self, split: str, seed: int) -> Dataset:
        """A split of the data set, cut to `max_samples`."""
        dataset = load_split(str(self.dataset_name), split, self.dataset_config)
        if len(dataset) == 0:
            raise ValueError(f"The split {split!r} of {self.dataset_name!r} is empty; give one with images.")
        if self.max_samples is not None and self.max_samples < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(self.max_samples))
        return dataset

    def names(self, dataset: Dataset, task: Task | None = None) -> list[str]:
        """The class names: as given, else the checkpoint's where it has as many classes, else the data set's.

        Raises:
            ValueError: None of them has any.
        """
        feature = dataset.features.get(self.label_column)
        known = feature.names if isinstance(feature, ClassLabel) else None
        if known is not None and self.name_until:
            known = [name.split(self.name_until)[0].strip() for name in known]
        if self.class_names is not None:
            return self.class_names
        if task is not None and (known is None or len(known) == len(task.class_names)):
            return list(task.class_names)
        if known is not None:
            return list(known)
        raise ValueError(
            f"The column {self.label_column!r} is {feature}, which carries no class names (columns: "
            f"{dataset.column_names}). Give --class_names, one for each label, or --label_column."
        )

    def attack(
        self, words: Sequence[str], fonts: Sequence[str], processor: ProcessorMixin, seed: int
    ) -> TypographicAttack:
        """The typographic attack that the arguments describe, on what the processor shows of an image."""
        low, high = self.attack_size
        return TypographicAttack(
            words=self.attack_words or list(words),
            other_words=self.attack_other_words or EVERYDAY_WORDS,
            other_share=self.attack_other_share,
            count=(self.attack_count[0], self.attack_count[1]),
            fonts=self.attack_fonts or list(fonts),
            size=(low, high),
            places=self.attack_places,
            rotation=(self.attack_rotation[0], self.attack_rotation[1]),
            sticker=self.attack_sticker,
            min_side=image_size(processor) or 224,
            crop=crop_side(processor),
            seed=seed,
        )


@dataclass(frozen=True)
class Task:
    """What a checkpoint was aligned with, kept beside it."""

    class_names: Sequence[str]
    prompt_template: str

    def save(self, folder: str | Path) -> None:
        """Write it into the checkpoint's folder."""
        Path(folder, TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Task | None:
        """Read it from a checkpoint's folder or the one above, or from the Hub; None where there is none."""
        file = next((f for f in (Path(folder, TASK_FILE), Path(folder).parent / TASK_FILE) if f.is_file()), None)
        if file is None and not Path(folder).exists():
            try:
                file = Path(hf_hub_download(str(folder), TASK_FILE))
            except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError):
                return None
        if file is None:
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            return cls(class_names=list(found["class_names"]), prompt_template=str(found["prompt_template"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} holds no class_names and prompt_template as JSON ({type(error).__name__}: {error}). "
                "Delete it and give --class_names and --prompt_template, or save the model again."
            ) from error


def flag_value(name: str, argv: Sequence[str]) -> str | None:
    """The value of a flag that must be known before all others are parsed, from the flags or the YAML file."""
    for position, word in enumerate(argv):
        if word == f"--{name}":
            return argv[position + 1] if position + 1 < len(argv) else None
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    if name != "config" and (file := flag_value("config", argv)) is not None:
        return read_recipe(file).get(name)
    return None


def parse_flags(parser: TrlParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """The arguments that flags and `--config` give, one object for each class of the parser.

    Raises:
        ValueError, OSError: As for `read_recipe`.
    """
    if (file := flag_value("config", argv)) is not None:
        read_recipe(file)  # TrlParser says nothing of the file that it can't read
    return parser.parse_args_and_config(list(argv))


def read_recipe(file: str) -> dict[str, Any]:
    """What a YAML file of flags says.

    Raises:
        ValueError: It is no YAML, or no mapping of flags to values.
        OSError: It can't be read.
    """
    with open(file, encoding="utf-8") as stream:
        try:
            found = yaml.safe_load(stream)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {file!r} is no YAML file ({error}). Mend it.") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"--config {file!r} must hold flags and their values, such as beta: 0.1, got {found!r}.")
    return found or {}
