"""Robustness to typographic attacks: images, answers of models, and metrics such as recovery and clean cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch import Tensor

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.words import spelling
from clip_po.data.bad_images import OnBadImage
from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_image, read_images, to_pixels
from clip_po.encoding import evaluating
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.class_doubles import first_alike
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.tables import format_table
from clip_po.evaluation.zero_shot import classify, collect_answers, embed_classes

VARIANTS = ("clean", "typographic", "occluded")
"""The images of an item: without an attack, with the attack word, with a meaningless string in its place."""

BLANK = "blank"
"""An optional fourth image: with an empty box that covers at least the area of the word."""


class RobustnessImages(torch.utils.data.Dataset):
    """Each image of a dataset in several variants: clean, with an attack word, and with a meaningless string.

    The variants differ in the ink only: all images are enlarged in the same way, and word and string have the same
    font, size, lines and place, and about the same amount of ink. The accuracy lost to the string is the effect of
    occlusion; the additional loss to the word is the effect of reading. Item i shows row i // renderings, drawn by the
    attack with index i in epoch 0. The pixels of an item are the same in every process and run.

    Args:
        dataset: One split with images and labels.
        attack: The attack that draws the words.
        processor: Processor of the models.
        class_names: C names in the order of the labels; None for the names of the ClassLabel column.
        image_column: Name of the image column.
        label_column: Name of the column of ClassLabel or integers.
        cluster_column: Name of the column that identifies related rows (scene, object, subject), for the intervals;
            None if rows are independent. Renderings of one row are always in one cluster.
        renderings: Attacks per row, >= 1.
        variants: `VARIANTS`, or (*VARIANTS, BLANK).
        keep_bytes: Memory in bytes for a cache of drawn items, >= 0. Use it when several models are evaluated one
            after the other in this process.
        on_bad_image: "raise" stops at an image that can't be read. "skip" leaves such rows out, as `readable_rows`
            does, in the constructor and in every process.

    Attributes:
        skipped_rows: Number of rows left out.
        class_names: The names, as a tuple.
        label: Array [N * renderings] of true classes.
        word: Array [N * renderings], the class named by the written word in any spelling; -1 if it names none.
        written: Array [N * renderings] of the words.
        cluster: Array [N * renderings] of cluster numbers.

    Raises:
        ValueError: As for `read_labels` and `read_images`; if `renderings` < 1, `cluster_column` does not exist, or no
            attack word is left for a class. An unreadable image raises when its item is accessed.
    """

    def __init__(
        self,
        dataset: Dataset,
        attack: TypographicAttack,
        processor: Any,
        class_names: Sequence[str] | None = None,
        *,
        image_column: str = "image",
        label_column: str = "label",
        cluster_column: str | None = None,
        renderings: int = 1,
        variants: Sequence[str] = VARIANTS,
        keep_bytes: int = 0,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        if tuple(variants) not in (VARIANTS, (*VARIANTS, BLANK)):
            raise ValueError(f"variants must be {VARIANTS}, optionally followed by {BLANK!r}, got {variants!r}.")
        if renderings < 1:
            raise ValueError(f"renderings must be at least 1, got {renderings!r}.")
        rows = len(dataset)
        dataset = readable_rows(dataset, image_column, on_bad_image)
        self.skipped_rows = rows - len(dataset)
        self.class_names, label = read_labels(dataset, label_column, class_names)
        self.attack, self.processor = attack, processor
        self.image_column, self.renderings = image_column, renderings
        self.variants = tuple(variants)
        self._images = read_images(dataset, image_column)
        self._room = keep_bytes
        self._kept: dict[int, Tensor] = {}
        self.label = np.repeat(label, renderings)
        self.cluster = np.repeat(read_clusters(dataset, cluster_column), renderings)
        words = [attack.word(index, exclude={self.class_names[truth]}) for index, truth in enumerate(self.label)]
        self.written = np.array(words, dtype=np.str_)
        self.word = np.array(_classes_named(words, self.class_names), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def rows(self) -> int:
        """Number of dataset rows, each in `renderings` items."""
        return len(self) // self.renderings

    def with_processor(self, processor: Any) -> RobustnessImages:
        """Return the same images, prepared by another processor.

        Args:
            processor: Processor of other models.

        Returns:
            A copy that shares images, labels and words but not the cache: it keeps no pixels.
        """
        other = copy.copy(self)
        other.processor, other._kept, other._room = processor, {}, 0
        return other

    def picture(self, index: int) -> Image.Image:
        """Draw the typographic image of an item, before the processor.

        Args:
            index: Number of the item, 0..N * renderings - 1.

        Returns:
            The image, RGB, as large as the `canvas` of the attack makes it.

        Raises:
            UnreadableImage: If the image of the row can't be read.
        """
        return self.attack.draw(self._read(index), str(self.written[index]), index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return pixels Tensor[3, H, W] under each name of `variants`, and label, word and cluster as integers."""
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = self._draw(index)
            size = pixels.numel() * pixels.element_size()
            if size <= self._room:
                self._kept[index] = pixels
                self._room -= size
        numbers = {name: int(getattr(self, name)[index]) for name in ("label", "word", "cluster")}
        return {**dict(zip(self.variants, pixels, strict=True)), **numbers}

    def _draw(self, index: int) -> Tensor:
        clean, word = self.attack.canvas(self._read(index)), str(self.written[index])
        pictures = [clean, self.attack.draw(clean, word, index), self.attack.draw_control(clean, word, index)]
        if BLANK in self.variants:
            pictures.append(self.attack.draw_blank(clean, word, index))
        return to_pixels(self.processor, pictures)

    def _read(self, index: int) -> Image.Image:
        return read_image(self._images, self.image_column, index // self.renderings)


def _classes_named(words: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the class that each word names: the first one of its exact name, else of another spelling; -1 if none."""
    exact: dict[str, int] = {}
    spelled: dict[str, int] = {}
    for number, name in enumerate(class_names):
        exact.setdefault(name, number)
        spelled.setdefault(spelling(name), number)
    return [exact.get(word, spelled.get(spelling(word), -1)) for word in words]


def read_clusters(dataset: Dataset, cluster_column: str | None) -> np.ndarray:
    """Return the cluster of each row, for the intervals.

    Args:
        dataset: One split, N rows.
        cluster_column: Name of the column that identifies related rows; None if every row is its own cluster.

    Returns:
        Array [N] of cluster numbers.

    Raises:
        ValueError: If there is no such column.
    """
    if cluster_column is None:
        return np.arange(len(dataset))
    if cluster_column not in dataset.column_names:
        raise ValueError(
            f"cluster_column={cluster_column!r} is not a column of the dataset, which has {dataset.column_names}."
        )
    values = list(dataset.with_format(None)[cluster_column])
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.int64)


@dataclass(frozen=True)
class Answers:
    """Predicted classes of models on the N items of a `RobustnessImages`.

    Attributes:
        class_names: Names of the classes.
        label: Array [N] of true classes.
        word: Array [N], the class named by the written word; -1 if it names none.
        written: Array [N] of the written words.
        cluster: Array [N] of cluster numbers.
        predicted: Predicted classes by model and by variant, arrays [N].
    """

    class_names: tuple[str, ...]
    label: np.ndarray
    word: np.ndarray
    written: np.ndarray
    cluster: np.ndarray
    predicted: Mapping[str, Mapping[str, np.ndarray]]

    @classmethod
    def about(cls, images: RobustnessImages, predicted: Mapping[str, Mapping[str, np.ndarray]]) -> Answers:
        """Return predictions together with the labels and words of the images.

        Args:
            images: The images, N items.
            predicted: Predicted classes by model and by variant, arrays [N].

        Returns:
            The answers. The arrays are shared, not copied.
        """
        return cls(images.class_names, images.label, images.word, images.written, images.cluster, predicted)

    @classmethod
    def about_clean(
        cls, class_names: tuple[str, ...], label: np.ndarray, predicted: Mapping[str, np.ndarray]
    ) -> Answers:
        """Return predictions on clean images, on which no word is written.

        Args:
            class_names: Names of the classes.
            label: Array [N] of true classes.
            predicted: Predicted classes by model, arrays [N].

        Returns:
            The answers, to the variant "clean".
        """
        nothing = np.full(len(label), -1), np.full(len(label), "")
        variants = {model: {"clean": classes} for model, classes in predicted.items()}
        return cls(class_names, label, *nothing, np.arange(len(label)), variants)

    def predictions_of(self, model: str) -> Mapping[str, np.ndarray]:
        """Return the predicted classes of one model by variant.

        Args:
            model: Name of the model.

        Returns:
            Arrays [N] by name of the variant.

        Raises:
            ValueError: If there are no answers of this model.
        """
        if model not in self.predicted:
            raise ValueError(f"No answers of model {model!r}. The models with answers are {list(self.predicted)}.")
        return self.predicted[model]


def evaluate_robustness(
    models: Mapping[str, Any],
    images: RobustnessImages,
    templates: Sequence[str],
    *,
    class_embeds: Mapping[str, Tensor] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> Answers:
    """Classify every variant of every image with several models, in one pass: each image is drawn once.

    Args:
        models: Two-tower models, or PeftModels around one, by name, each on any device. They share the processor of
            `images`.
        images: The images.
        templates: Prompts with one `{}`, as for `class_embeddings`.
        class_embeds: Class embeddings by model, Tensor[C, D], unit-norm; used instead of the templates.
        batch_size: Items per batch and process, >= 1. A model sees this many images at a time.
        num_workers: Number of worker processes that draw images, >= 0.
        accelerator: Divides the items among its processes. Every process gets all answers, and they do not depend on
            the number of processes. None runs in this process alone.
        disable_tqdm: Whether to hide the progress bar.

    Returns:
        The predicted classes by model and variant.

    Raises:
        ValueError: If there are no models, an image is not readable, or as for `class_embeddings`.
        TypeError: As for `clip_po.encoding.dual_encoder`.
    """
    if not models:
        raise ValueError("models is empty. Give at least one model by name.")
    given = class_embeds or {}
    others = {name: model for name, model in models.items() if name not in given}
    texts = {**given, **embed_classes(others, images.processor, images.class_names, templates)}

    first = {name: first_alike(embeds) for name, embeds in texts.items()}

    def answers(batch: dict[str, Tensor]) -> Tensor:
        columns = [
            first[name][classify(model, batch[variant], texts[name]).argmax(dim=1).to(first[name].device)].cpu()
            for name, model in models.items()
            for variant in images.variants
        ]
        return torch.stack(columns, dim=1)

    with evaluating(*models.values()):
        width = len(models) * len(images.variants)
        table = collect_answers(
            images, answers, width, batch_size, num_workers, accelerator, disable_tqdm, "Robustness"
        )
    by_model = table.reshape(len(images), len(models), len(images.variants))
    predicted = {
        name: {variant: by_model[:, position, place] for place, variant in enumerate(images.variants)}
        for position, name in enumerate(models)
    }
    return Answers.about(images, predicted)


def _fooled(means: Mapping[str, np.ndarray]) -> np.ndarray:
    return means["fooled"] / means["word_is_class"]


def _recovery(means: Mapping[str, np.ndarray]) -> np.ndarray:
    lost = means["base_clean"] - means["base_typographic"]
    # Undefined if the words cost the base nothing: a negative share would mislead.
    return np.where(lost > 0, (means["typographic"] - means["base_typographic"]) / lost, np.nan)


_METRICS: dict[str, Statistic] = {
    "clean_accuracy": lambda means: means["clean"],
    "typographic_accuracy": lambda means: means["typographic"],
    "occluded_accuracy": lambda means: means["occluded"],
    "fooled": _fooled,
    "reading_effect": lambda means: means["occluded"] - means["typographic"],
    "kept_answers": lambda means: means["kept"],
}
_METRICS_IF_BLANK: dict[str, Statistic] = {
    "blank_accuracy": lambda means: means["blank"],
}
_METRICS_AGAINST_BASE: dict[str, Statistic] = {
    "recovery": _recovery,
    "clean_cost": lambda means: 100 * (means["base_clean"] - means["clean"]),
}


def robustness_report(
    answers: Answers,
    model: str,
    base: str | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute the metrics of one model with intervals over clusters; against a base, paired on the same images.

    - clean_accuracy, typographic_accuracy, occluded_accuracy: accuracy on each variant, 0..1.
    - fooled: share of typographic images classified as the written word, among those whose word names a class, 0..1;
      nan if there are none.
    - reading_effect: occluded minus typographic accuracy, the cost of the word's meaning beyond its ink.
    - kept_answers: share of typographic images classified as the same model classifies the clean image.
    - blank_accuracy: accuracy with an empty box in place of the word, if the images have that variant.
    - recovery: (typographic - base typographic) / (base clean - base typographic), the share of the lost accuracy
      that was regained: 0 is none, 1 is all; nan if the words cost the base nothing.
    - clean_cost: 100 (base clean - clean), in percentage points; negative if clean accuracy rose.

    Args:
        answers: From `evaluate_robustness`.
        model: Name of the model.
        base: Name of the model before alignment; None, or the model itself, for the metrics of one model only.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: If there are no answers of the model or the base.

    Source: clean and typographic accuracy before and after alignment follow Afzali et al. 2025, arXiv 2411.08923;
    recovery and clean cost summarize the four in two numbers.
    """
    said = answers.predictions_of(model)
    columns = {variant: got == answers.label for variant, got in said.items()}
    names_class = answers.word >= 0
    columns["word_is_class"] = names_class
    columns["fooled"] = names_class & (said["typographic"] == answers.word)
    columns["kept"] = said["typographic"] == said["clean"]
    metrics = dict(_METRICS)
    if BLANK in said:
        metrics |= _METRICS_IF_BLANK
    if base is not None and base != model:
        columns |= {f"base_{variant}": got == answers.label for variant, got in answers.predictions_of(base).items()}
        metrics |= _METRICS_AGAINST_BASE
    return {
        name: bootstrap_interval(statistic, columns, answers.cluster, confidence, resamples, seed)
        for name, statistic in metrics.items()
    }


COLUMNS: Mapping[str, str] = {
    "clean_accuracy": "clean",
    "typographic_accuracy": "typographic",
    "fooled": "fooled",
    "occluded_accuracy": "occluded",
    "reading_effect": "reading effect",
    "recovery": "recovery",
    "clean_cost": "clean cost (points)",
}
"""Metrics in the order of `robustness_table`, with the headers of their columns."""


def robustness_table(reports: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Format reports of several models as a Markdown table.

    Args:
        reports: Reports from `robustness_report` by name of the model.

    Returns:
        One row per model and one column per metric, with intervals in brackets.
    """
    metrics = [name for name in COLUMNS if any(name in found for found in reports.values())]
    rows = [[model, *(found.get(name) for name in metrics)] for model, found in reports.items()]
    return format_table(["model", *(COLUMNS[name] for name in metrics)], rows)
