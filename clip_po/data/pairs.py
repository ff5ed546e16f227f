"""Numbered preferences for training and evaluation, each with its regularization image."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from clip_po.candidates import CandidateTexts
from clip_po.config import ContrastivePOConfig
from clip_po.data.anchored_candidates import fit_candidates
from clip_po.data.anchored_checks import check_losses
from clip_po.data.anchored_rows import AnchoredRows
from clip_po.data.bad_images import OnBadImage, read_or_blank
from clip_po.data.embedding_cache import image_digest
from clip_po.data.formats import IMAGE_COLUMNS, Row
from clip_po.data.grades import check_grade_columns
from clip_po.data.images import blank_image, is_transformed
from clip_po.data.row_completion import RowCompletion, image_sources, regularization_image
from clip_po.data.rows import as_rows
from clip_po.data.sampler import RowKey
from clip_po.data.typographic_preferences import TypographicStream
from clip_po.unpaired import ratio_advice
from clip_po.validation import UnreadableImage

logger = logging.get_logger(__name__)


class PreferencePairs(torch.utils.data.Dataset[Row]):
    """Preferences by (epoch, position, row), each with its regularization image.

    Args:
        preferences: A `datasets.Dataset` in a preference format, or an implementation of `PreferenceRows` such as
            `TypographicPreferences`.
        regularization: Ordinary images in a column `image`, "clean_image" for that column of each row, or None.
        candidate_texts: The candidate texts of every row, if any.
        seed: Seed of the order of the regularization images.
        name: Name of the preferences in messages.
        targets: "clean_image" where a loss compares with the reference on each row's clean image.
        on_bad_image: As in `ContrastivePOConfig`. Under "skip" a row says in `skipped` why it is skipped, or "".

    Attributes:
        reference: The reference's embeddings of fixed images, by name of `fixed_images`.
        without_images: Whether rows come without images once the embeddings of all of them are known.
    """

    def __init__(
        self,
        preferences: Any,
        regularization: Dataset | Literal["clean_image"] | None = None,
        candidate_texts: CandidateTexts | None = None,
        seed: int = 0,
        name: str = "train_dataset",
        targets: Literal["clean_image"] | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        candidates = CandidateTexts() if candidate_texts is None else candidate_texts
        self.preferences = as_rows(preferences, candidates, name)
        self.completion = RowCompletion(regularization, targets, seed, on_bad_image)
        self.name = name
        self.reference: Mapping[str, Tensor] = {}
        self._readable: Mapping[str, Tensor] = {}
        self.without_images = False

    def __len__(self) -> int:
        return len(self.preferences)

    @property
    def redrawn(self) -> bool:
        """Whether the images of the preferences differ from epoch to epoch."""
        return self.preferences.redrawn or self.preferences.transformed

    # ---- Images that are the same in every epoch

    @property
    def _own_regularization(self) -> Dataset | None:
        """The regularization dataset, where the images are not the rows' clean images."""
        return self.completion.regularization if isinstance(self.completion.regularization, Dataset) else None

    @property
    def fixed_images(self) -> tuple[str, ...]:
        """The names of `image`, `reg_image`, `target_image` that are the same in every epoch."""
        apart = self._own_regularization
        changing = {
            "image": self.redrawn,
            "reg_image": self.preferences.transformed if apart is None else is_transformed(apart),
            "target_image": self.preferences.transformed,
        }
        return tuple(name for name in changing if name in self._used_images and not changing[name])

    @property
    def _used_images(self) -> set[str]:
        sources = {"reg_image": self.completion.regularization, "target_image": self.completion.targets}
        return {"image", *(name for name, source in sources.items() if source is not None)}

    def image_count(self, name: str) -> int:
        """Return the number of images of a name.

        Args:
            name: A name of `fixed_images`.

        Returns:
            The number of regularization images for "reg_image" if they come from a dataset of their own; of all
            images of the rows for "image"; otherwise the number of rows.
        """
        if name == "reg_image" and self._own_regularization is not None:
            return len(self._own_regularization)
        if name == "image" and isinstance(self.preferences, AnchoredRows):
            return self.preferences.image_count
        return len(self)

    def fixed_image(self, name: str, index: int) -> Image.Image | None:
        """Read an image that is the same in every epoch.

        Args:
            name: A name of `fixed_images`.
            index: Number of the image, 0..`image_count(name)`-1.

        Returns:
            RGB image; None if it can't be read and `on_bad_image` is "skip".

        Raises:
            UnreadableImage: If the image can't be read and `on_bad_image` is "raise".
        """
        image, reason = read_or_blank(functools.partial(self._fixed_image, name, index), self.completion.on_bad_image)
        return None if reason else image

    def _fixed_image(self, name: str, index: int) -> Image.Image:
        if name == "reg_image" and self._own_regularization is not None:
            return regularization_image(self._own_regularization, index)
        return self.preferences.image("image" if name == "image" else "clean_image", index)

    def digest(self, name: str) -> str | None:
        """Return a digest of all images of a name, for the embedding cache.

        Args:
            name: A name of `fixed_images`.

        Returns:
            The digest; None for no caching: if a file can't be read and `on_bad_image` is "skip", or if the
            preferences give no digest.

        Raises:
            UnreadableImage: If a file can't be read and `on_bad_image` is "raise".
        """
        try:
            if name == "reg_image" and self._own_regularization is not None:
                return image_digest(self._own_regularization, "image")
            return self.preferences.digest("image" if name == "image" else "clean_image")
        except UnreadableImage:
            if self.completion.on_bad_image == "raise":
                raise
            return None

    def attach_reference(self, embeds: Mapping[str, Tensor], readable: Mapping[str, Tensor] | None = None) -> None:
        """Give rows the reference's embeddings of their fixed images.

        Args:
            embeds: By name of `fixed_images`: Tensor[`image_count`, D].
            readable: By the same names, bool[`image_count`]: False where `fixed_image` returned None. The embedding
                is then that of a `blank_image`, and rows with the image are skipped. Default: all True.

        Raises:
            ValueError: If none of the images of a name can be read.
        """
        for name, images in (readable or {}).items():
            if not images.any():
                raise ValueError(f"None of the {len(images)} images can be read. {self._why_unreadable(name, 0)}")
        self.reference, self._readable = embeds, readable or {}

    def _why_unreadable(self, name: str, index: int) -> str:
        _, reason = read_or_blank(functools.partial(self._fixed_image, name, index), "skip")
        return reason or f"{self.name}: {name} {index} was not readable when the reference embedded it."

    @property
    def embedded(self) -> bool:
        """Whether the embedding of every image of every row is known, so that rows come without images."""
        return self.without_images and self._used_images <= set(self.reference)

    # ---- Rows

    def __getitem__(self, key: int | RowKey) -> Row:
        epoch, position, index = key if isinstance(key, tuple) else (0, key, key)
        turn = epoch * len(self) + position
        row, reasons = (self.preferences.texts(index, epoch), {}) if self.embedded else self._read(index, epoch)
        self._add_reference(row, reasons, index, turn)
        return self.completion.complete(row, reasons, turn, padding=position >= len(self))

    def _read(self, index: int, epoch: int) -> tuple[Row, dict[str, str]]:
        """Return a row, and by column why its images can't be read, where such rows are skipped."""
        try:
            return self.preferences.row(index, epoch), {}
        except UnreadableImage as error:
            if self.completion.on_bad_image == "raise":
                raise
            reason = str(error)
        if isinstance(self.preferences, AnchoredRows):
            return self.preferences.blank(index, epoch), dict.fromkeys(IMAGE_COLUMNS, reason)
        columns = [name for name in IMAGE_COLUMNS if name in self.preferences.column_names]
        found = {
            name: read_or_blank(functools.partial(self.preferences.image, name, index), "skip") for name in columns
        }
        reasons = {name: why for name, (_, why) in found.items() if why}
        if not reasons:  # a transform or an attack that failed in this epoch alone
            found, reasons = dict.fromkeys(columns, (blank_image(), reason)), dict.fromkeys(columns, reason)
        return {**self.preferences.texts(index, epoch), **{name: image for name, (image, _) in found.items()}}, reasons

    def _add_reference(self, row: Row, reasons: dict[str, str], index: int, turn: int) -> None:
        """Add the reference's embeddings to a row, and by column why an image of them could not be read."""
        for name, embeds in self.reference.items():
            column, numbers = ("image" if name == "image" else "clean_image"), range(index, index + 1)
            if name == "reg_image" and self._own_regularization is not None:
                number = self.completion.regularization_index(self._own_regularization, turn)
                column, numbers = name, range(number, number + 1)
            elif name == "image" and isinstance(self.preferences, AnchoredRows):
                numbers = self.preferences.images_of(index)
            found = embeds[numbers.start : numbers.stop]
            row[f"ref_{name}_embeds"] = found if name == "image" and "image_count" in row else found[0]
            unread = [n for n in numbers if name in self._readable and not self._readable[name][n]]
            if column not in reasons and unread:
                reasons[column] = self._why_unreadable(name, unread[0])


class EvaluationPairs(PreferencePairs):
    """Preferences for evaluation. Every evaluation uses the rows of epoch 0, so that their images stay the same."""

    @property
    def redrawn(self) -> bool:
        """Whether a transform may change the images each time they are read."""
        return self.preferences.transformed


def checked_pairs(
    preferences: Any,
    regularization: Dataset | None,
    candidate_texts: CandidateTexts,
    args: ContrastivePOConfig,
    name: str,
    kind: type[PreferencePairs] = PreferencePairs,
) -> PreferencePairs:
    """Return preference pairs whose rows are checked, except for their images.

    Args:
        preferences: As for `PreferencePairs`.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        candidate_texts: The candidate texts of every row, if any.
        args: Losses, `reg_weight`, seed, and what to do with unreadable images.
        name: Name of the preferences in messages.
        kind: `EvaluationPairs` for evaluation.

    Returns:
        The pairs, of class `kind`. The seed of the regularization images is `data_seed`, by default `seed`.

    Raises:
        ValueError: If there are no rows, if columns, texts, labels or weights don't suit the losses, if images that
            the losses or `reg_weight` need are missing, or if `precompute_ref_log_probs` is True and images are
            redrawn each epoch or transformed as they are read.
        TypeError: If `preferences` is streamed or not of an accepted type, if `regularization` is used and is not a
            `datasets.Dataset`, or if an entry of a row's `candidates` is not a string.
    """
    other_stream = isinstance(preferences, torch.utils.data.IterableDataset) and name != "train_dataset"
    if other_stream or isinstance(preferences, (IterableDataset, TypographicStream)):
        raise TypeError(
            f"{name} is streamed, which only train_dataset may be, as a datasets.IterableDataset or a "
            "TypographicStream. An evaluation counts every row once and in the same order. Load it without "
            "streaming=True, or keep a part: Dataset.from_list(list(stream.take(1000)), features=stream.features)."
        )
    rows = as_rows(preferences, candidate_texts, name)
    if len(rows) == 0:
        raise ValueError(f"{name} is empty; give it at least one row.")
    check_grade_columns(rows.column_names, args, name)
    check_losses(rows.kinds if isinstance(rows, AnchoredRows) else ["texts"], args.loss_type, name)
    rows.check(candidate_texts, args.loss_type, name)
    if isinstance(rows, AnchoredRows):
        fit_candidates(rows.kinds, rows.has_candidates, regularization, candidate_texts, args, name)
        advice = ratio_advice(*rows.label_counts, args.desirable_weight, args.undesirable_weight)
        if advice:
            logger.warning(advice)
    source, targets = image_sources(rows.column_names, regularization, args, name)
    seed = args.data_seed if args.data_seed is not None else args.seed
    pairs = kind(rows, source, candidate_texts, seed, name, targets, args.on_bad_image)
    if args.precompute_ref_log_probs and pairs.redrawn:
        raise ValueError(
            f"precompute_ref_log_probs=True, but the images of {name} are redrawn each epoch. Set redraw='never' in "
            "the attack so that they stay the same, or leave precompute_ref_log_probs out: the reference sees clean "
            "images only once in either case."
        )
    return pairs
