"""What completes a preference, numbered or streamed: weights, regularization image, target and reason to skip it."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Literal

from datasets import Dataset
from PIL import Image
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.bad_images import OnBadImage, read_or_blank
from clip_po.data.formats import Row, check_regularization, is_text, read_row
from clip_po.data.sampler import permutation
from clip_po.losses import ANCHORED, TARGETED
from clip_po.validation import check_text

logger = logging.get_logger(__name__)


class RowCompletion:
    """Completes preferences.

    Args:
        regularization: Ordinary images in a column `image`, with a column `text` their texts too; "clean_image" for
            that column of each row; or None.
        targets: "clean_image" where a loss compares with the reference on each row's clean image.
        seed: Seed of the order of the regularization images.
        on_bad_image: "raise", or "skip" to give rows with an unreadable image the weight 0.

    Attributes:
        targets: The argument; None where the regularization image of a row is its clean image, and so its target.
    """

    def __init__(
        self,
        regularization: Dataset | Literal["clean_image"] | None,
        targets: Literal["clean_image"] | None,
        seed: int,
        on_bad_image: OnBadImage,
    ) -> None:
        self.regularization = regularization
        self.targets = None if regularization == "clean_image" else targets
        self.seed = seed
        self.on_bad_image = on_bad_image
        preference, regularized = ["weight", "counted"], ["reg_row_weight"]
        clean = preference * (targets is not None) + regularized * (regularization == "clean_image")
        self._reg_texts: Dataset | None = None
        if isinstance(regularization, Dataset) and "text" in regularization.column_names:
            self._reg_texts = regularization.with_format(None).select_columns(["text"])
        # Weights that mean nothing without an image, by its column.
        self._weights = {"image": preference, "clean_image": clean, "reg_image": regularized}

    @property
    def needs_clean_image(self) -> bool:
        """Whether the clean image of a row is used."""
        return bool(self._weights["clean_image"])

    def regularization_index(self, images: Dataset, turn: int) -> int:
        """Return the number of a row's regularization image. All images come once, then again in a new random order.

        Args:
            images: The regularization dataset, not empty.
            turn: Number of rows before this one in all epochs.

        Returns:
            Row of `images`. It depends on the seed, `turn` and the number of images alone.
        """
        cycle, offset = divmod(turn, len(images))
        return permutation(len(images), self.seed, cycle)[offset]

    def complete(self, row: Row, reasons: dict[str, str], turn: int, padding: bool) -> Row:
        """Add weights, regularization image and target to a row, and under "skip" in `skipped` why it is skipped.

        Args:
            row: The preference; without `image` if embeddings of all its images are known.
            reasons: By image column, why the image can't be read. An unreadable regularization image is added.
            turn: Number of rows before this one in all epochs.
            padding: Whether the row only fills up a batch. Its weights are 0 and `skipped` is None.

        Returns:
            `row` itself, changed: `weight` is 1 if it had none, `counted` is 1, `reg_row_weight` is 1, or 0 without
            regularization, and `reg_image` and `target_image` are RGB images where they are used. Each of the three is
            0 if an image that it needs can't be read. Without images, no image is added. `reg_text` is the text of
            the regularization image, where the dataset has texts.

        Raises:
            UnreadableImage: If the regularization image can't be read and `on_bad_image` is "raise".
        """
        row.setdefault("weight", 1.0)
        row["counted"] = 1.0
        row["reg_row_weight"] = 0.0 if self.regularization is None else 1.0
        if self._reg_texts is not None:
            row["reg_text"] = self._reg_texts[self.regularization_index(self._reg_texts, turn)]["text"]
        if "image" in row or "images" in row:
            if self.targets is not None and "ref_target_image_embeds" not in row:
                row["target_image"] = row["clean_image"]
            if isinstance(self.regularization, Dataset):
                index = self.regularization_index(self.regularization, turn)
                read = functools.partial(regularization_image, self.regularization, index)
                row["reg_image"], reason = read_or_blank(read, self.on_bad_image)
                if reason:
                    reasons["reg_image"] = reason
            elif self.regularization is not None:
                row["reg_image"] = row["clean_image"]
        for name in {name for column in reasons for name in self._weights[column]}:
            row[name] = 0.0
        if self.on_bad_image == "skip":
            counted = dict.fromkeys(reason for column, reason in reasons.items() if self._weights[column])
            row["skipped"] = None if padding else "; ".join(counted)
        if padding:
            row["weight"] = row["counted"] = row["reg_row_weight"] = 0.0
        return row


def regularization_image(dataset: Dataset, index: int) -> Image.Image:
    """Read an image of the regularization dataset.

    Args:
        dataset: Rows with a column `image`.
        index: Number of the row.

    Returns:
        RGB image.

    Raises:
        UnreadableImage: If the image is missing or can't be read; the message names row and column.
    """
    return read_row(dataset, index, "reg_dataset")["image"]


def image_sources(
    columns: Collection[str], regularization: Dataset | None, args: ContrastivePOConfig, name: str
) -> tuple[Dataset | Literal["clean_image"] | None, Literal["clean_image"] | None]:
    """Return where regularization images and targets come from.

    Args:
        columns: Columns of the preferences.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        args: Losses and `reg_weight`.
        name: Name of the preferences in messages.

    Returns:
        `regularization` and `targets`, as for `RowCompletion`.

    Raises:
        ValueError, TypeError: If the losses need images that are missing, or `regularization` can't be used.
    """
    source: Dataset | Literal["clean_image"] | None = None
    if args.reg_weight > 0 or ANCHORED & set(args.loss_type):
        if regularization is None and "clean_image" not in columns:
            raise ValueError(
                f"reg_weight={args.reg_weight} and loss_type={args.loss_type} need ordinary images, but there is no "
                f"reg_dataset and {name} has no column 'clean_image'. Pass reg_dataset=..., or set reg_weight=0 "
                "(except with kto_pair, whose reference point is the KL on these images)."
            )
        if regularization is not None:
            check_regularization(regularization)
            regularization = _read_texts(regularization, args.reg_type)
        source = regularization if regularization is not None else "clean_image"
    targeted = sorted(TARGETED & set(args.loss_type))
    if targeted and "clean_image" not in columns:
        raise ValueError(
            f"loss_type={targeted} compares with the reference on each row's clean image, but {name} has no column "
            "'clean_image'. Add the images before the attack, or leave the loss out."
        )
    return source, "clean_image" if targeted else None


def _read_texts(regularization: Dataset, reg_type: str) -> Dataset:
    """Return regularization images with their texts, if the KL runs over these, or without them."""
    if "text" not in regularization.column_names:
        return regularization
    if reg_type != "kl" or not is_text(regularization.features["text"]):
        return regularization.remove_columns("text")
    for index, text in enumerate(regularization.with_format(None)["text"]):
        check_text(text, f"reg_dataset row {index}: column 'text'", "Fill it in, drop the row, or remove the column.")
    logger.info("The KL runs over the texts and images of reg_dataset in each batch, in both directions.")
    return regularization
