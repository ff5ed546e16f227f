"""Unlabelled images as training rows: attacked as the task's images are, with the reference's answer as target.

They show more of the world than the images of one task do: crops and collages of any photographs, or of its own.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any

import PIL
from datasets import Dataset
from PIL import Image

from clip_po.candidates import CandidateTexts
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.embedding_cache import fingerprint, image_digest
from clip_po.data.formats import Row, check_regularization
from clip_po.data.images import is_transformed
from clip_po.data.row_completion import regularization_image
from clip_po.data.sampler import permutation
from clip_po.data.typographic_preferences import TypographicPreferences

SMALLEST_CROP = 0.4
"""Size of the smallest random crop, as a share of the largest one with the same proportions."""

COLLAGE = 4
"""Number of images in a collage, in two rows."""

ROWS_PER_CROP = 4
"""Of so many rows, one shows a crop of a single image, and the others show collages."""


class GenericImages:
    """Unlabelled images as rows with an attack word and without a chosen text, which losses without labels read.

    Three rows of four show a collage of random crops of four images, with their things in other company. The fourth
    shows a random crop of a single image, with its things at another size. Each image comes up equally often. The
    pictures are the same in every epoch, so that the reference embeds them once. Words are drawn by the attack, with
    the number of the row + `offset` as the index.

    Args:
        images: Images of any kind in a column `image`.
        attack: Draws words and styles.
        count: Number of rows, >= 1.
        candidates: The texts among which the policy chooses, if the trainer has no `candidate_texts`.
        offset: Number that is added to the number of a row for the draws, so that they differ from those of the task.

    Raises:
        TypeError: If `images` is not a `datasets.Dataset`.
        ValueError: If it is empty, or has no column `image` of images.
    """

    column_names = ("image", "clean_image", "chosen", "rejected", "candidates", "weight")

    def __init__(
        self,
        images: Dataset,
        attack: TypographicAttack,
        count: int,
        candidates: Sequence[str],
        offset: int = 0,
    ) -> None:
        check_regularization(images)
        self.images = images
        self.attack = attack
        self.count = count
        self.candidates = list(candidates)
        self.offset = offset

    def __len__(self) -> int:
        return self.count

    @property
    def redrawn(self) -> bool:
        """Whether the attacked images differ from epoch to epoch."""
        return self.attack.redraw == "every_epoch"

    @property
    def transformed(self) -> bool:
        """Whether a transform of the user, which may be random, changes images as they are read."""
        return is_transformed(self.images)

    def row(self, index: int, epoch: int) -> Row:
        """Return a row as drawn in an epoch.

        Args:
            index: Number of the row.
            epoch: Epoch, counted from 0.

        Returns:
            `image` (attacked) and `clean_image`, both RGB, and the texts and weight of `texts`.

        Raises:
            UnreadableImage: If the image can't be read.
        """
        clean, number = self.image("clean_image", index), self.offset + index
        word = self.attack.word(number, epoch)
        return {
            "image": self.attack.draw(clean, word, number, epoch),
            "clean_image": clean,
            **self.texts(index, epoch),
        }

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row without its images.

        Args:
            index: Not used: all rows have the same texts.
            epoch: Not used.

        Returns:
            `chosen` None, no `rejected` texts, the `candidates`, and the `weight` 1.
        """
        return {"chosen": None, "rejected": [], "candidates": self.candidates, "weight": 1.0}

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row of epoch 0.

        Args:
            name: "clean_image", or "image" for the attacked image.
            index: Number of the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If it can't be read.
        """
        if name == "image":
            return self.row(index, 0)[name]
        rng = random.Random(f"crop/{self.attack.seed}/{index}")
        crops_before = -(-index // ROWS_PER_CROP)
        turn = crops_before + COLLAGE * (index - crops_before)
        if index % ROWS_PER_CROP == 0:
            return _random_crop(self._image(turn), (1, 1), rng)
        side = self.attack.crop or self.attack.min_side
        boxes = _tiles(side, rng)
        sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes]
        crops = [_random_crop(self._image(turn + number), size, rng) for number, size in enumerate(sizes)]
        return _collage(side, crops, boxes)

    def _image(self, turn: int) -> Image.Image:
        """Read an image. All come once, then again in a new random order."""
        cycle, offset = divmod(turn, len(self.images))
        return regularization_image(self.images, permutation(len(self.images), self.attack.seed, cycle)[offset])

    def digest(self, name: str) -> str:
        """Return a digest of everything that the images of a column in epoch 0 depend on.

        Args:
            name: "image" or "clean_image".

        Returns:
            SHA-256 as 64 hexadecimal digits.

        Raises:
            UnreadableImage: If a file can't be read; the message names the row.
        """
        shown = repr((self.count, self.attack.seed, self.attack.crop, self.attack.min_side, SMALLEST_CROP))
        cropped = [image_digest(self.images, "image"), shown, version("clip_po")]
        if name == "clean_image":
            return fingerprint(*cropped)
        return fingerprint(*cropped, repr((self.attack, self.offset)), PIL.__version__)


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


def _tiles(side: int, rng: random.Random) -> list[Box]:
    """Return four tiles of a square, which meet at a random point away from its edges."""
    x, y = (rng.randint(side // 4, side - side // 4) for _ in range(2))
    return [(0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)]


def _random_crop(image: Image.Image, proportions: tuple[int, int], rng: random.Random) -> Image.Image:
    """Return a random crop of an image, with these proportions of width to height."""
    largest = min(limit / part for limit, part in zip(image.size, proportions, strict=True))
    scale = largest * rng.uniform(SMALLEST_CROP, 1)
    width, height = (
        max(1, min(limit, round(part * scale))) for limit, part in zip(image.size, proportions, strict=True)
    )
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _collage(side: int, images: Sequence[Image.Image], boxes: Sequence[Box]) -> Image.Image:
    picture = Image.new("RGB", (side, side))
    for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
        picture.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return picture


class MixedPreferences:
    """The preferences of a task followed by generic images, as one sequence of rows.

    Args:
        task: The labelled rows.
        generic: The unlabelled rows.
    """

    column_names = GenericImages.column_names

    def __init__(self, task: TypographicPreferences, generic: GenericImages) -> None:
        self.task = task
        self.generic = generic

    def __len__(self) -> int:
        return len(self.task) + len(self.generic)

    @property
    def redrawn(self) -> bool:
        """Whether attacked images differ from epoch to epoch."""
        return self.task.redrawn or self.generic.redrawn

    @property
    def transformed(self) -> bool:
        """Whether any image may differ each time it is read."""
        return self.task.transformed or self.generic.transformed

    def _source(self, index: int) -> tuple[TypographicPreferences | GenericImages, int]:
        return (self.task, index) if index < len(self.task) else (self.generic, index - len(self.task))

    def row(self, index: int, epoch: int) -> Row:
        """Return a row of an epoch.

        Args:
            index: Number of the row; those of the task come first.
            epoch: Epoch, counted from 0.

        Returns:
            The row with the columns of `column_names`.

        Raises:
            UnreadableImage: If one of its images can't be read.
        """
        source, number = self._source(index)
        return self._completed(source.row(number, epoch))

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row of an epoch without its images.

        Args:
            index: Number of the row.
            epoch: Epoch, counted from 0.

        Returns:
            The row without `image` and `clean_image`.
        """
        source, number = self._source(index)
        return self._completed(source.texts(number, epoch))

    def _completed(self, row: Row) -> Row:
        # An attack word may be no class: the policy chooses among the classes and the words of the row.
        return {"candidates": list(dict.fromkeys([*self.generic.candidates, *row["rejected"]])), **row}

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row of epoch 0.

        Args:
            name: "image" or "clean_image".
            index: Number of the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If it can't be read.
        """
        source, number = self._source(index)
        return source.image(name, number)

    def digest(self, name: str) -> str:
        """Return a digest of all images of a column in epoch 0.

        Args:
            name: "image" or "clean_image".

        Returns:
            SHA-256 as 64 hexadecimal digits.

        Raises:
            UnreadableImage: If a file can't be read; the message names the row.
        """
        return fingerprint(self.task.digest(name), self.generic.digest(name))

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if the texts of the task don't suit the losses or the candidate texts.

        Args:
            candidate_texts: The candidate texts of every row, if any.
            loss_types: Names of the losses.
            name: Name of the preferences in messages.

        Raises:
            ValueError: If they don't.
        """
        self.task.check(candidate_texts, loss_types, name)


def mixed_preferences(task: Any, images: Dataset | None, share: float) -> MixedPreferences:
    """Mix generic images into the preferences of a task.

    Args:
        task: The preferences of the trainer.
        images: Generic images in a column `image`; None for the task's own images.
        share: Share of the generic images among all rows, in (0, 1).

    Returns:
        All rows of the task, and as many generic rows as the share says, at least one.

    Raises:
        TypeError: If the task is not a `TypographicPreferences`, whose attack writes the words.
        ValueError: If there are no images in a column `image`.
    """
    if not isinstance(task, TypographicPreferences):
        raise TypeError(
            f"reg_share={share!r} writes words on generic images, for which train_dataset must be "
            f"TypographicPreferences, got {type(task).__name__}. Set reg_share=0: the images of reg_dataset are then "
            "only regularized."
        )
    if images is None:
        own = task.images
        images = own if task.image_column == "image" else own.rename_column(task.image_column, "image")
    count = max(1, round(share / (1 - share) * len(task)))
    return MixedPreferences(task, GenericImages(images, task.attack, count, task.candidate_texts, len(task)))
