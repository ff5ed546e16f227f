"""Labelled images as preferences: an attack word is written on each; its class is chosen and the word rejected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Literal

import PIL
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from clip_po.candidates import CandidateTexts
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.words import spelling
from clip_po.data.class_labels import known_class_names, read_labels, read_weights
from clip_po.data.class_positions import check_different_names
from clip_po.data.embedding_cache import fingerprint, image_digest
from clip_po.data.formats import Row
from clip_po.data.images import read_image, read_images
from clip_po.data.stream_reader import columns_of
from clip_po.losses import SINGLE_REJECTED
from clip_po.validation import check_label, check_row_weight, check_template

Rejected = Literal["word", "others"]


class AttackedClasses:
    """What numbered and streamed typographic preferences share: the attack, the classes, and the rejected texts.

    Args:
        attack: Draws words and styles.
        class_names: The classes by label.
        template: Prompt of a class, with one `{}`.
        rejected: "word" rejects the text of each written word, "others" the texts of all other classes too.

    Raises:
        ValueError: If the template does not contain exactly one `{}`, or `rejected` is unknown.
        TypeError: If `attack` is not a `TypographicAttack`, or the template is not a string.
    """

    column_names = ("image", "clean_image", "chosen", "rejected", "weight")
    weight_column: str | None
    image_columns: Sequence[str]
    """Columns of the labelled images."""

    def __init__(
        self, attack: TypographicAttack, class_names: Sequence[str], template: str, rejected: Rejected
    ) -> None:
        if rejected not in ("word", "others"):
            raise ValueError(f"rejected must be 'word' or 'others', got {rejected!r}.")
        if not isinstance(attack, TypographicAttack):
            raise TypeError(
                f"attack must be a TypographicAttack, such as TypographicAttack(words=class_names), got {attack!r}."
            )
        check_template(template)
        check_different_names(class_names)
        for name in class_names:
            attack.check_words_left([name])
        self.attack = attack
        self.class_names = list(class_names)
        self.template = template
        self.rejected = rejected
        self._named: dict[str, str] = {}
        for word in (*self.class_names, *attack.vocabulary):  # a class keeps its own spelling in texts
            self._named.setdefault(spelling(word), word)

    @property
    def candidate_texts(self) -> list[str]:
        """The prompts of the classes: candidate texts for the trainer."""
        return [self._prompt(name) for name in self.class_names]

    @property
    def all_texts(self) -> list[str]:
        """Every text that a row may hold: the prompts of the classes and of other attack words."""
        return [self._prompt(name) for name in self._named.values()]

    @property
    def most_rejected(self) -> int:
        """The largest number of rejected texts of a row."""
        others = len(self.class_names) - 1 if self.rejected == "others" else 0
        return max(self.attack.count[1], others)

    def words(self, label: int, index: int, epoch: int) -> tuple[str, ...]:
        """Draw the attack words of a row, none of them a spelling of its class.

        Args:
            label: Class of the row, 0..C-1.
            index: Number of the row.
            epoch: Epoch, counted from 0.

        Returns:
            The words, as many as `attack.count` allows.

        Raises:
            ValueError: If no attack word besides the class is left.
        """
        return self.attack.written(index, epoch, exclude={self.class_names[label]})

    def attacked(self, clean: Image.Image, words: Sequence[str], index: int, epoch: int) -> Image.Image:
        """Write the attack words of a row on its clean image.

        Args:
            clean: PIL image of any mode; it is not changed.
            words: The words, at least one. Spaces separate them.
            index: Number of the row, from which its style is drawn.
            epoch: Epoch, counted from 0.

        Returns:
            RGB image, of the size of `attack.canvas(clean)`.

        Raises:
            TypeError: If `clean` is not a PIL image.
            ValueError: If there is no word, or the image can't be converted; see `to_rgb`.
        """
        return self.attack.draw(clean, " ".join(words), index, epoch)

    def preference(self, label: int, words: Sequence[str]) -> Row:
        """Return the chosen and the rejected texts of a row.

        Args:
            label: Its class.
            words: Its attack words, as returned by `words`.

        Returns:
            `chosen`, the prompt of the class, and `rejected`, the prompts of the attack words and, under "others", of
            all other classes after them.
        """
        name = self.class_names[label]
        wrong = [self._named[spelling(word)] for word in words]
        if self.rejected == "others":
            wrong += [other for other in self.class_names if other != name and other not in wrong]
        return {"chosen": self._prompt(name), "rejected": [self._prompt(rejected) for rejected in wrong]}

    def check(self, candidate_texts: CandidateTexts, loss_types: Collection[str], name: str) -> None:
        """Raise if texts that may be drawn don't suit the losses or the candidate texts.

        Args:
            candidate_texts: The candidate texts of every row, if any.
            loss_types: Names of the losses.
            name: Name of the preferences in messages.

        Raises:
            ValueError: If a loss compares with one rejected text and there may be more, if a text may be drawn that
                is not a candidate, or if the model can't tell two of the texts apart.
        """
        single = SINGLE_REJECTED & set(loss_types)
        if single and self.most_rejected > 1:
            raise ValueError(
                f"{name} rejects up to {self.most_rejected} texts per row, but {sorted(single)} compare the chosen "
                "text with one. Set rejected='word' and the attack's count=(1, 1), or use 'sigmoid' (S-DPO)."
            )
        missing = [text for text in self.all_texts if text not in (candidate_texts.texts or self.all_texts)]
        if missing:
            raise ValueError(
                f"{name} may draw the texts {missing[:3]} ({len(missing)} in all), which are not among the "
                "candidate_texts. Pass candidate_texts=dataset.candidate_texts and attack words that are class "
                "names, or leave candidate_texts out."
            )

        if candidate_texts.tokens is not None:
            tokens = candidate_texts.tokens
            tokens.warn_of_cut(tokens.learn(self.all_texts), name)
            tokens.check_differ(self.all_texts, f"{name} may draw", "Leave one of the two names out, or rename it.")

    def _prompt(self, name: str) -> str:
        return self.template.replace("{}", name)


class TypographicPreferences(AttackedClasses, torch.utils.data.Dataset[Row]):
    """Labelled images as numbered preferences, drawn by a typographic attack.

    Rows are image-preferences with a `clean_image`. They are drawn from (attack.seed, epoch, index) alone, the same in
    any process, worker or resumed run. `dataset[index]` is the row of epoch 0, a fixed map for evaluation.

    Args:
        dataset: Rows with an image and a class.
        attack: Draws words and styles; its words are usually the class names.
        class_names: The classes by label; the names of the `ClassLabel` feature by default.
        template: Prompt of a class, with one `{}`.
        image_column: Name of the image column.
        label_column: Name of the class column, `ClassLabel` or int.
        rejected: "word" rejects the text of each written word; "others" also the texts of all other classes (S-DPO),
            because a single rejected text moves one difference of logits only.
        weight_column: Name of a column of row weights >= 0, such as the confidence of `pseudo_labels`. By default all
            rows have the weight 1.

    Raises:
        ValueError: If a column or the class names are missing, a label is out of range, the template does not contain
            exactly one `{}`, or `rejected` is unknown.
        TypeError: If `dataset` is not a single split. Wrap a streamed one in `TypographicStream`.
    """

    transformed = False

    def __init__(
        self,
        dataset: Dataset,
        attack: TypographicAttack,
        class_names: Sequence[str] | None = None,
        template: str = "a photo of a {}",
        image_column: str = "image",
        label_column: str = "label",
        rejected: Rejected = "word",
        weight_column: str | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError("dataset is streamed. Wrap it in TypographicStream(stream, attack, ...).")
        names, labels = read_labels(dataset, label_column, class_names)
        super().__init__(attack, names, template, rejected)
        self.dataset = dataset
        self.labels: list[int] = labels.tolist()
        self.weights = [1.0] * len(labels) if weight_column is None else read_weights(dataset, weight_column)
        self.image_column, self.label_column, self.weight_column = image_column, label_column, weight_column
        self.images = read_images(dataset, image_column)
        self.image_columns = dataset.column_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        return self.row(index, epoch=0)

    @property
    def redrawn(self) -> bool:
        """Whether the attacked images differ from epoch to epoch."""
        return self.attack.redraw == "every_epoch"

    def row(self, index: int, epoch: int) -> Row:
        """Return a row as drawn in an epoch.

        Args:
            index: Number of the row.
            epoch: Epoch, counted from 0. It changes nothing if the attack's `redraw` is "never".

        Returns:
            `image` (attacked) and `clean_image`, both RGB, `chosen`, `rejected` and `weight`.

        Raises:
            UnreadableImage: If the clean image is missing or can't be read; the message names row and column.
            ValueError: If no attack word is left for the row.
        """
        clean = self.image("clean_image", index)
        words = self.words(self.labels[index], index, epoch)
        return {
            "image": self.attacked(clean, words, index, epoch),
            "clean_image": clean,
            **self._texts(index, words),
        }

    def texts(self, index: int, epoch: int) -> Row:
        """Return a row without its images, which are neither read nor drawn.

        Args:
            index: Number of the row.
            epoch: Epoch, counted from 0.

        Returns:
            `chosen`, `rejected` and `weight`, the same as in `row`.

        Raises:
            ValueError: If no attack word is left for the row.
        """
        return self._texts(index, self.words(self.labels[index], index, epoch))

    def _texts(self, index: int, words: Sequence[str]) -> Row:
        return {**self.preference(self.labels[index], words), "weight": self.weights[index]}

    def image(self, name: str, index: int) -> Image.Image:
        """Return one image of a row of epoch 0.

        Args:
            name: "clean_image", or "image" for the attacked image.
            index: Number of the row.

        Returns:
            RGB image.

        Raises:
            UnreadableImage: If the clean image is missing or can't be read; the message names row and column.
            ValueError: If no attack word is left for the row and `name` is "image".
        """
        return read_image(self.images, self.image_column, index) if name == "clean_image" else self[index][name]

    def digest(self, name: str) -> str:
        """Return a digest of everything that the images of a column in epoch 0 depend on.

        Args:
            name: "clean_image" for the stored images alone; "image" for the attack, class names, labels and the
                versions of clip_po and Pillow too.

        Returns:
            SHA-256 as 64 hexadecimal digits.

        Raises:
            UnreadableImage: If a file can't be read; the message names the row.
        """
        images = image_digest(self.dataset, self.image_column)
        if name == "clean_image":
            return images
        drawn = repr((self.attack, self.class_names, self.labels))
        return fingerprint(images, drawn, version("clip_po"), PIL.__version__)  # both versions affect the drawing


class TypographicStream(AttackedClasses):
    """A stream of labelled images as preferences, the streamed form of `TypographicPreferences`.

    An attack is drawn from (attack.seed, epoch, number of the row in its pass). Labels and weights are checked as
    rows arrive.

    Args:
        stream: Rows with an image and a class.
        attack: Draws words and styles; its words are usually the class names.
        class_names: The classes by label; the names of the `ClassLabel` feature by default.
        template: Prompt of a class, with one `{}`.
        image_column: Name of the image column.
        label_column: Name of the class column, `ClassLabel` or int.
        rejected: "word" or "others", as for `TypographicPreferences`.
        weight_column: Name of a column of row weights >= 0. By default all rows have the weight 1.

    Raises:
        ValueError: If a column or the class names are missing, the template does not contain exactly one `{}`, or
            `rejected` is unknown.
        TypeError: If `stream` is not a `datasets.IterableDataset`.
    """

    def __init__(
        self,
        stream: IterableDataset,
        attack: TypographicAttack,
        class_names: Sequence[str] | None = None,
        template: str = "a photo of a {}",
        image_column: str = "image",
        label_column: str = "label",
        rejected: Rejected = "word",
        weight_column: str | None = None,
    ) -> None:
        if not isinstance(stream, IterableDataset):
            raise TypeError(
                f"stream must be a datasets.IterableDataset, got {type(stream).__name__}. Wrap a datasets.Dataset in "
                "TypographicPreferences."
            )
        columns = columns_of(stream, "stream")
        for name in filter(None, (image_column, label_column, weight_column)):
            if name not in columns:
                raise ValueError(f"The stream has no column {name!r}; it has {columns}.")
        names = known_class_names((stream.features or {}).get(label_column), label_column, class_names)
        super().__init__(attack, names, template, rejected)
        self.stream = stream
        self.image_columns = columns
        self.image_column, self.label_column, self.weight_column = image_column, label_column, weight_column

    def label_and_weight(self, values: Row, where: str) -> tuple[int, float]:
        """Return the class and the weight of a row, checked.

        Args:
            values: The row as read from the stream.
            where: The row in messages.

        Returns:
            label: Class, 0..C-1.
            weight: Weight >= 0; 1 without a `weight_column`.

        Raises:
            ValueError: If the label is out of range, or the weight is not a finite number >= 0.
        """
        label = values[self.label_column]
        check_label(label, len(self.class_names), f"{where}: column {self.label_column!r}")
        weight = 1.0 if self.weight_column is None else values[self.weight_column]
        check_row_weight(weight, f"{where}: column {self.weight_column!r}")
        return int(label), float(weight)
