"""Rows by name: preferences with their regularization images, and preferences drawn by a typographic attack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import PIL
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor

from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.class_labels import read_image, read_images, read_labels, read_weights
from clip_po.data.embedding_cache import fingerprint, image_digest
from clip_po.data.formats import IMAGE_COLUMNS, Row, read_row, to_texts
from clip_po.data.sampler import RowKey, permutation
from clip_po.data.skipped_rows import UnreadableImage, blank_image
from clip_po.data.typographic import TypographicRows


class TypographicPreferences(TypographicRows, torch.utils.data.Dataset[Row]):
    """Labelled images as preferences: an attack word is written on each; its class is chosen, the word rejected.

    Rows are image-preferences with a `clean_image`, drawn from (attack.seed, epoch, index) alone: the same in
    any process, worker or resume. `dataset[index]` is the row of epoch 0, a fixed map for evaluation.

    Args:
        dataset: Rows with an image and a class.
        attack: Draws words and styles; its words are usually the class names.
        class_names: The classes by label; the names of the ClassLabel feature where it is None.
        template: Prompt of a class, with one `{}`.
        image_column: Name of the image column.
        label_column: Name of the class column, ClassLabel or int.
        rejected: "word" rejects the text of the written word alone (of each, where several are written); "others"
            those of all other classes too (S-DPO): a single rejected text moves one difference of logits only.
        weight_column: Name of a column of weights >= 0 of the rows, such as the confidence of `pseudo_labels`; None
            weighs all alike.

    Raises:
        ValueError: Missing columns, no class names, a label out of range, a template without its one `{}`, or an
            unknown `rejected`.
        TypeError: `dataset` is no single split; a streamed one makes a `TypographicStream`.
    """

    def __init__(
        self,
        dataset: Dataset,
        attack: TypographicAttack,
        class_names: Sequence[str] | None = None,
        template: str = "a photo of a {}",
        image_column: str = "image",
        label_column: str = "label",
        rejected: Literal["word", "others"] = "word",
        weight_column: str | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError("dataset is streamed: TypographicStream(stream, attack, ...) takes its rows as they come.")
        names, labels = read_labels(dataset, label_column, class_names)
        super().__init__(attack, names, template, rejected)
        self.dataset = dataset
        self.labels: list[int] = labels.tolist()
        self.weights = [1.0] * len(labels) if weight_column is None else read_weights(dataset, weight_column)
        self.image_column, self.label_column = image_column, label_column
        self.images = read_images(dataset, image_column)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        return self.row(index, epoch=0)

    def clean(self, index: int) -> Image.Image:
        """The image of row `index` before the attack."""
        return read_image(self.images, self.image_column, index)

    def digest(self, column: str) -> str:
        """What the images of `image` or `clean_image` in epoch 0 are made from, as one name."""
        images = image_digest(self.dataset, self.image_column)
        if column == "clean_image":
            return images
        drawn = repr((self.attack, self.class_names, self.labels))
        return fingerprint(images, drawn, version("clip_po"), PIL.__version__)  # the latter two draw

    def row(self, index: int, epoch: int) -> Row:
        """The preference of row `index` as drawn in `epoch`."""
        clean = self.clean(index)
        image = self.attacked(clean, self.labels[index], index, epoch)
        return {"image": image, "clean_image": clean, **self.texts_of(index, epoch)}

    def texts_of(self, index: int, epoch: int) -> Row:
        """What `row` holds besides images, which are neither read nor drawn."""
        return {**self.preference(self.labels[index], index, epoch), "weight": self.weights[index]}


class PreferencePairs(torch.utils.data.Dataset[Row]):
    """Preferences by (epoch, position, row), each with its regularization image.

    Args:
        preferences: A `datasets.Dataset` in a preference format, or rows that differ by epoch: an object with
            `row(index, epoch)`, `clean(index)`, `redrawn`, `texts`, `most_rejected`, `column_names` and a length,
            such as `TypographicPreferences`.
        regularization: Ordinary images in a column `image`, "clean_image" for that column of each row, or None
            for none.
        candidate_texts: The candidate texts of every row, or None where each row names its own.
        seed: Seed of the order of the regularization images.
        name: What messages call the preferences.
        targets: "clean_image" where a loss compares with the reference on each row's clean image.
        on_bad_image: As in `ContrastivePOConfig`. Under "skip" a row says in `skipped` why it is, or "".
    """

    def __init__(
        self,
        preferences: Any,
        regularization: Dataset | Literal["clean_image"] | None = None,
        candidate_texts: Sequence[str] | None = None,
        seed: int = 0,
        name: str = "train_dataset",
        targets: Literal["clean_image"] | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.preferences = preferences
        self.regularization = regularization
        self.candidate_texts = candidate_texts
        self.seed = seed
        self.name = name
        # Where the ordinary image of a row is its own clean image, one is the other's target already.
        self.targets = None if regularization == "clean_image" else targets
        self.on_bad_image = on_bad_image
        own = ["weight"] * (targets is not None) + ["reg_row_weight"] * (regularization == "clean_image")
        # The weights that say nothing without an image.
        self._needed_by = {"image": ["weight"], "clean_image": own, "reg_image": ["reg_row_weight"]}
        self.reference: Mapping[str, Tensor] = {}
        self._readable: Mapping[str, Tensor] = {}
        self._columns: dict[str, Dataset] = {}
        self.without_images = False
        self._texts: list[Row] | None = None

    def __len__(self) -> int:
        return len(self.preferences)

    @property
    def redrawn(self) -> bool:
        """Whether the images of the preferences differ from epoch to epoch."""
        return getattr(self.preferences, "redrawn", False) or _transformed(self.preferences)

    @property
    def fixed_images(self) -> tuple[str, ...]:
        """Which of `image`, `reg_image`, `target_image` are the same in every epoch: they need be seen only once."""
        sources = {"reg_image": self.regularization, "target_image": self.targets}
        owners = {name: self.preferences if s == "clean_image" else s for name, s in sources.items() if s is not None}
        fixed = tuple(name for name, owner in owners.items() if not _transformed(owner))
        return fixed if self.redrawn else ("image", *fixed)

    def image_count(self, column: str) -> int:
        """How many images a column of `fixed_images` has."""
        if column == "reg_image" and isinstance(self.regularization, Dataset):
            return len(self.regularization)
        return len(self)

    def fixed_image(self, column: str, index: int) -> Image.Image | None:
        """An image of `fixed_images`; None where it can't be read and rows without theirs are skipped."""
        try:
            if column == "reg_image" and isinstance(self.regularization, Dataset):
                return read_row(self.regularization, index, "reg_dataset")["image"]
            return self._image("image" if column == "image" else "clean_image", index)
        except UnreadableImage:
            if self.on_bad_image == "raise":
                raise
            return None

    def _image(self, name: str, index: int) -> Image.Image:
        if hasattr(self.preferences, "row"):
            return self.preferences.clean(index) if name == "clean_image" else self.preferences.row(index, 0)[name]
        if name not in self._columns:
            self._columns[name] = self.preferences.select_columns([name])  # so that one image is decoded, not two
        return read_row(self._columns[name], index, self.name)[name]

    def digest(self, column: str) -> str | None:
        """What a column of `fixed_images` is made from, as one name; None where that can't be known."""
        name = "image" if column == "image" else "clean_image"
        try:
            if column == "reg_image" and isinstance(self.regularization, Dataset):
                return image_digest(self.regularization, "image")
            if isinstance(self.preferences, Dataset):
                return image_digest(self.preferences, name)
            return self.preferences.digest(name) if hasattr(self.preferences, "digest") else None
        except ValueError:  # a file is missing
            if self.on_bad_image == "raise":
                raise
            return None

    def attach_reference(self, embeds: Mapping[str, Tensor], readable: Mapping[str, Tensor] | None = None) -> None:
        """Give rows the reference's embeddings of their fixed images.

        Args:
            embeds: By name of `fixed_images`: Tensor[`image_count`, D].
            readable: By the same names, Tensor[`image_count`] of bools: False where `fixed_image` gave None and the
                embedding is that of a `blank_image`, so that its rows are skipped. Default: all are.

        Raises:
            ValueError: None of the images can be read.
        """
        for name, images in (readable or {}).items():
            if not images.any():
                raise ValueError(f"None of the {len(images)} images can be read. {self._why(name, 0)}")
        self.reference, self._readable = embeds, readable or {}

    def _why(self, column: str, index: int) -> str:
        """Why a fixed image can't be read."""
        reader = copy.copy(self)
        reader.on_bad_image = "raise"
        try:
            reader.fixed_image(column, index)
        except UnreadableImage as error:
            return str(error)
        return f"{self.name}: {column} {index} could not be read when the reference saw it, and can be by now."

    def _reg_index(self, turn: int, index: int) -> int:
        """The regularization row of a row: all in turn, in a new random order each time through."""
        if not isinstance(self.regularization, Dataset):
            return index
        cycle, offset = divmod(turn, len(self.regularization))
        return permutation(len(self.regularization), self.seed, cycle)[offset]

    def _preference(self, index: int, epoch: int) -> tuple[Row, dict[str, str]]:
        """A row, and by column why an image of it can't be read, where such rows are skipped."""
        try:
            if hasattr(self.preferences, "row"):
                return self.preferences.row(index, epoch), {}
            return to_texts(read_row(self.preferences, index, self.name), self.candidate_texts), {}
        except UnreadableImage as error:
            if self.on_bad_image == "raise":
                raise
            return self._blanked(index, epoch, str(error))

    def _blanked(self, index: int, epoch: int, reason: str) -> tuple[Row, dict[str, str]]:
        columns = [name for name in IMAGE_COLUMNS if name in self.preferences.column_names]
        if hasattr(self.preferences, "row"):
            row = self.preferences.texts_of(index, epoch)
        else:
            if "texts" not in self._columns:
                self._columns["texts"] = self.preferences.with_format(None).remove_columns(columns)
            row = to_texts(self._columns["texts"][index], self.candidate_texts)
        if hasattr(self.preferences, "row") or _transformed(self.preferences):  # one image is made from the other
            return {**row, **{name: blank_image() for name in columns}}, dict.fromkeys(columns, reason)
        images = {name: self.fixed_image(name, index) for name in columns}
        reasons = {name: self._why(name, index) for name, image in images.items() if image is None}
        return {**row, **{name: image or blank_image() for name, image in images.items()}}, reasons

    @property
    def embedded(self) -> bool:
        """Whether every image of every row is known by its embedding, so that rows come without images."""
        wanted = {"image", *(["reg_image"] if self.regularization is not None else [])}
        return self.without_images and wanted | ({"target_image"} if self.targets else set()) <= set(self.reference)

    def _texts_of(self, index: int, epoch: int) -> Row:
        if hasattr(self.preferences, "row"):
            return self.preferences.texts_of(index, epoch)
        if self._texts is None:
            columns = [c for c in self.preferences.column_names if c not in IMAGE_COLUMNS]
            self._texts = self.preferences.select_columns(columns).to_list()
        return to_texts(dict(self._texts[index]), self.candidate_texts)

    def __getitem__(self, key: int | RowKey) -> Row:
        epoch, position, index = key if isinstance(key, tuple) else (0, key, key)
        row, reasons = (self._texts_of(index, epoch), {}) if self.embedded else self._preference(index, epoch)
        return self._complete(row, reasons, index, epoch * len(self) + position, padding=position >= len(self))

    def _complete(self, row: Row, reasons: dict[str, str], index: int, turn: int, padding: bool) -> Row:
        """A preference with weights, its ordinary image and target, and what the reference knows of them.

        Args:
            row: The preference.
            reasons: By column, why its images can't be read.
            index: Its number.
            turn: The number of rows that came before it in all epochs.
            padding: It is no row of its own.
        """
        embedded = self.embedded
        reg_index = self._reg_index(turn, index)
        apart = isinstance(self.regularization, Dataset)
        row["weight"] = row.get("weight", 1.0)
        row["reg_row_weight"] = 0.0 if self.regularization is None else 1.0
        if self.targets is not None and not embedded and "target_image" not in self.reference:
            row["target_image"] = row["clean_image"]
        if self.regularization is not None and not embedded:
            image = self.fixed_image("reg_image", reg_index) if apart else row["clean_image"]
            if image is None:
                image, reasons["reg_image"] = blank_image(), self._why("reg_image", reg_index)
            row["reg_image"] = image
        for name, embeds in self.reference.items():
            number = reg_index if name == "reg_image" else index
            row[f"ref_{name}_embeds"] = embeds[number]
            column = name if name == "image" or (name == "reg_image" and apart) else "clean_image"
            if column not in reasons and name in self._readable and not self._readable[name][number]:
                reasons[column] = self._why(name, number)
        for name in {name for column in reasons for name in self._needed_by[column]}:
            row[name] = 0.0
        if self.on_bad_image == "skip":
            said = "; ".join(dict.fromkeys(reason for column, reason in reasons.items() if self._needed_by[column]))
            row["skipped"] = None if padding else said
        if padding:
            row["weight"] = row["reg_row_weight"] = 0.0
        return row


def _transformed(dataset: Any) -> bool:
    """Whether a transform of the user's, which may be random, changes rows as they are read."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


class EvaluationPairs(PreferencePairs):
    """Preference pairs of evaluation, which are always those of epoch 0: their images stay the same."""

    @property
    def redrawn(self) -> bool:
        """Whether a transform may change the images each time they are read."""
        return _transformed(self.preferences)
