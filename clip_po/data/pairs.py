"""Rows by name: preferences with their regularization images, and preferences drawn by a typographic attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor

from clip_po.caching import fingerprint, image_digest
from clip_po.config import ContrastivePOConfig
from clip_po.data.formats import IMAGE_COLUMNS, Row, check_preferences, check_regularization, read_row, to_texts
from clip_po.data.labelled import read_image, read_images, read_labels, read_weights
from clip_po.data.typographic import TypographicAttack
from clip_po.losses import SINGLE_REJECTED, TARGETED
from clip_po.sampling import RowKey, permutation


class TypographicPreferences(torch.utils.data.Dataset[Row]):
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
    """

    column_names = ("image", "clean_image", "chosen", "rejected", "weight")

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
        if rejected not in ("word", "others"):
            raise ValueError(f"rejected must be 'word' or 'others', got {rejected!r}.")
        if template.count("{}") != 1:
            raise ValueError(f"template must hold one '{{}}' where the class name goes, got {template!r}.")
        names, labels = read_labels(dataset, label_column, class_names)
        self.dataset = dataset
        self.class_names = list(names)
        self.labels: list[int] = labels.tolist()
        self.weights = [1.0] * len(labels) if weight_column is None else read_weights(dataset, weight_column)
        self.image_column, self.label_column = image_column, label_column
        self.images = read_images(dataset, image_column)
        self.attack = attack
        self.template = template
        self.rejected = rejected

    @property
    def candidate_texts(self) -> list[str]:
        """The prompts of the classes: candidate texts for the trainer."""
        return [self.template.replace("{}", name) for name in self.class_names]

    @property
    def texts(self) -> list[str]:
        """Every text that a row may carry."""
        names = dict.fromkeys((*self.class_names, *self.attack.vocabulary))
        return [self.template.replace("{}", name) for name in names]

    @property
    def most_rejected(self) -> int:
        """The largest number of rejected texts of a row."""
        others = len(self.class_names) - 1 if self.rejected == "others" else 0
        return max(self.attack.count[1], others)

    @property
    def redrawn(self) -> bool:
        """Whether the images differ from epoch to epoch."""
        return self.attack.redraw == "every_epoch"

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
        return (
            images
            if column == "clean_image"
            else fingerprint(images, repr((self.attack, self.class_names, self.labels)))
        )

    def row(self, index: int, epoch: int) -> Row:
        """The preference of row `index` as drawn in `epoch`."""
        clean = self.clean(index)
        words = self._written(index, epoch)
        image = self.attack.draw(clean, " ".join(words), index, epoch)
        return {"image": image, "clean_image": clean, **self.texts_of(index, epoch)}

    def texts_of(self, index: int, epoch: int) -> Row:
        """What `row` holds besides images, which are neither read nor drawn."""
        name, words = self.class_names[self.labels[index]], self._written(index, epoch)
        others = [n for n in self.class_names if n != name and n not in words] if self.rejected == "others" else []
        return {
            "chosen": self.template.replace("{}", name),
            "rejected": [self.template.replace("{}", rejected) for rejected in (*words, *others)],
            "weight": self.weights[index],
        }

    def _written(self, index: int, epoch: int) -> Sequence[str]:
        return self.attack.written(index, epoch, exclude={self.class_names[self.labels[index]]})


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
    """

    def __init__(
        self,
        preferences: Any,
        regularization: Dataset | Literal["clean_image"] | None = None,
        candidate_texts: Sequence[str] | None = None,
        seed: int = 0,
        name: str = "train_dataset",
        targets: Literal["clean_image"] | None = None,
    ) -> None:
        self.preferences = preferences
        self.regularization = regularization
        self.candidate_texts = candidate_texts
        self.seed = seed
        self.name = name
        # Where the ordinary image of a row is its own clean image, one is the other's target already.
        self.targets = None if regularization == "clean_image" else targets
        self.reference: Mapping[str, Tensor] = {}
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

    def fixed_image(self, column: str, index: int) -> Image.Image:
        """An image of `fixed_images`."""
        if column == "reg_image" and isinstance(self.regularization, Dataset):
            return read_row(self.regularization, index, "reg_dataset")["image"]
        name = "image" if column == "image" else "clean_image"
        if hasattr(self.preferences, "row"):
            return self.preferences.clean(index) if name == "clean_image" else self.preferences.row(index, 0)[name]
        if name not in self._columns:
            self._columns[name] = self.preferences.select_columns([name])  # so that one image is decoded, not two
        return read_row(self._columns[name], index, self.name)[name]

    def digest(self, column: str) -> str | None:
        """What a column of `fixed_images` is made from, as one name; None where that can't be known."""
        if column == "reg_image" and isinstance(self.regularization, Dataset):
            return image_digest(self.regularization, "image")
        name = "image" if column == "image" else "clean_image"
        if isinstance(self.preferences, Dataset):
            return image_digest(self.preferences, name)
        return self.preferences.digest(name) if hasattr(self.preferences, "digest") else None

    def attach_reference(self, embeds: Mapping[str, Tensor]) -> None:
        """Give rows the reference's embeddings of their fixed images.

        Args:
            embeds: By name of `fixed_images`: Tensor[`image_count`, D].
        """
        self.reference = embeds

    def _reg_index(self, epoch: int, position: int, index: int) -> int:
        """The regularization row of a row: all in turn, in a new random order each time through."""
        if not isinstance(self.regularization, Dataset):
            return index
        cycle, offset = divmod(epoch * len(self) + position, len(self.regularization))
        return permutation(len(self.regularization), self.seed, cycle)[offset]

    def _preference(self, index: int, epoch: int) -> Row:
        if hasattr(self.preferences, "row"):
            return self.preferences.row(index, epoch)
        return to_texts(read_row(self.preferences, index, self.name), self.candidate_texts)

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
        embedded = self.embedded
        row = self._texts_of(index, epoch) if embedded else self._preference(index, epoch)
        padding = position >= len(self)
        row["weight"] = 0.0 if padding else row.get("weight", 1.0)
        row["reg_row_weight"] = 0.0 if padding or self.regularization is None else 1.0
        if "image" in self.reference:
            row["ref_image_embeds"] = self.reference["image"][index]
        if self.targets is not None:
            if not embedded:
                row["target_image"] = row["clean_image"]
            if "target_image" in self.reference:
                row["ref_target_image_embeds"] = self.reference["target_image"][index]
        if self.regularization is not None:
            reg_index = self._reg_index(epoch, position, index)
            apart = isinstance(self.regularization, Dataset)
            if not embedded:
                row["reg_image"] = self.fixed_image("reg_image", reg_index) if apart else row["clean_image"]
            if "reg_image" in self.reference:
                row["ref_reg_image_embeds"] = self.reference["reg_image"][reg_index]
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


def checked_pairs(
    preferences: Any,
    regularization: Dataset | None,
    candidate_texts: Sequence[str] | None,
    args: ContrastivePOConfig,
    name: str,
    kind: type[PreferencePairs] = PreferencePairs,
) -> PreferencePairs:
    """Preference pairs whose rows were checked, all but their images.

    Args:
        preferences: As for `PreferencePairs`.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        candidate_texts: As for the trainer.
        args: Says which columns the losses need, and the seed.
        name: What messages call the preferences.
        kind: `EvaluationPairs` for evaluation.

    Raises:
        ValueError, TypeError: What was found, in which row and column, and what to do.
    """
    if isinstance(preferences, (IterableDataset, torch.utils.data.IterableDataset)):
        raise TypeError(
            f"{name} is streamed, but rows are named by their number so that a run can be resumed exactly. Load it "
            "without streaming=True, or save its rows first: Dataset.from_generator(...)."
        )
    if hasattr(preferences, "__len__") and len(preferences) == 0:
        raise ValueError(f"{name} is empty; give it at least one row.")
    if hasattr(preferences, "row"):
        single = SINGLE_REJECTED & set(args.loss_type)
        if single and preferences.most_rejected > 1:
            raise ValueError(
                f"{name} rejects up to {preferences.most_rejected} texts a row, but {sorted(single)} compare the "
                "chosen text with one. Set rejected='word' and the attack's count=(1, 1), or use 'sigmoid' (S-DPO)."
            )
        missing = [text for text in preferences.texts if text not in (candidate_texts or preferences.texts)]
        if missing:
            raise ValueError(
                f"{name} may draw the texts {missing[:3]} ({len(missing)} in all), which are not among the "
                "candidate_texts. Pass candidate_texts=dataset.candidate_texts and attack words that are class "
                "names, or leave candidate_texts out."
            )
    elif isinstance(preferences, Dataset):
        check_preferences(preferences, candidate_texts, args.loss_type, name)
    else:
        raise TypeError(
            f"{name} must be a datasets.Dataset or TypographicPreferences, got {type(preferences).__name__}. "
            "Dataset.from_list(rows) makes one of a list of dicts."
        )
    source: Dataset | Literal["clean_image"] | None = None
    if args.reg_weight > 0 or "kto_pair" in args.loss_type:
        if regularization is None and "clean_image" not in preferences.column_names:
            raise ValueError(
                f"reg_weight={args.reg_weight} and loss_type={args.loss_type} need ordinary images, but there is no "
                f"reg_dataset and {name} has no column 'clean_image'. Pass reg_dataset=..., or set reg_weight=0 "
                "(not for kto_pair, whose reference point is their KL)."
            )
        if regularization is not None:
            check_regularization(regularization)
        source = regularization if regularization is not None else "clean_image"
    targeted = sorted(TARGETED & set(args.loss_type))
    if targeted and "clean_image" not in preferences.column_names:
        raise ValueError(
            f"loss_type={targeted} compares with the reference on each row's clean image, but {name} has no column "
            "'clean_image': add the images before the attack, or leave the loss out."
        )
    seed = args.data_seed if args.data_seed is not None else args.seed
    pairs = kind(preferences, source, candidate_texts, seed, name, "clean_image" if targeted else None)
    if args.precompute_ref_log_probs and pairs.redrawn:
        raise ValueError(
            f"precompute_ref_log_probs=True, but the images of {name} are drawn anew each epoch. Set the attack's "
            "redraw='never' so that they stay the same, or leave precompute_ref_log_probs out: clean images are "
            "seen once all the same."
        )
    return pairs
