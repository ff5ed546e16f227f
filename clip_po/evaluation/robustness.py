"""What words written on images cost a model, and how much of it an aligned model gets back."""

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

from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_image, read_images, to_pixels
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval
from clip_po.evaluation.tables import format_table
from clip_po.evaluation.zero_shot import class_embeddings, classify, collect_answers
from clip_po.policy import evaluating

VARIANTS = ("clean", "typographic", "occluded")
"""The three images of an item: without ink, with the attack word, with a meaningless string in its place."""

BLANK = "blank"
"""A fourth image where it is asked for: with a box without a word, which covers at least what the word does."""


class RobustnessImages(torch.utils.data.Dataset):
    """Every image of a data set clean, with an attack word, and with a meaningless string in its place.

    The three differ by ink only: all are enlarged alike, and word and string share font, size, lines and place,
    and have about as much ink. What the string costs is occlusion; what the word costs beyond it is reading. Item
    i shows row i // renderings, drawn by the attack with index i in epoch 0; the same item is the same pixels
    anywhere.

    Args:
        dataset: One split with images and labels.
        attack: Draws the words.
        processor: CLIPProcessor of the models.
        class_names: C names in the order of the labels; None for those of the ClassLabel column.
        image_column: Column of images.
        label_column: Column of ClassLabel or integers.
        cluster_column: Column that names what rows have in common (scene, object, subject), for intervals;
            None where every row is on its own. Renderings of one row always belong together.
        renderings: Attacks per row, >= 1.
        variants: `VARIANTS`, or (*VARIANTS, BLANK).
        keep_bytes: Memory for the pixels of items, which are drawn only once where they fit: for several models
            evaluated in turn in this process.

    Attributes:
        class_names: The names, as a tuple.
        label: Array [N * renderings] of true classes.
        word: Array [N * renderings], the class that the written word names; -1 where it names none.
        written: Array [N * renderings] of the words.
        cluster: Array [N * renderings] of cluster numbers.

    Raises:
        ValueError: As for `read_labels` and `read_images`; `renderings` < 1; an unknown `cluster_column`; no
            attack word is left for a class. An image that can't be read raises when its item is asked for.
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
    ) -> None:
        if tuple(variants) not in (VARIANTS, (*VARIANTS, BLANK)):
            raise ValueError(f"variants must be {VARIANTS}, with {BLANK!r} after them or without, got {variants!r}.")
        if renderings < 1:
            raise ValueError(f"renderings must be at least 1, got {renderings!r}.")
        self.class_names, label = read_labels(dataset, label_column, class_names)
        self.attack, self.processor = attack, processor
        self.image_column, self.renderings = image_column, renderings
        self.variants = tuple(variants)
        self._images = read_images(dataset, image_column)
        self._room = keep_bytes
        self._kept: dict[int, Tensor] = {}
        self.label = np.repeat(label, renderings)
        self.cluster = np.repeat(_clusters(dataset, cluster_column), renderings)
        # A word differing in case alone is the class itself to a reader, so it is never a wrong word.
        folded = {word: word.casefold() for word in attack.words}
        same = [[w for w in folded if folded[w] == name.casefold()] for name in self.class_names]
        words = [attack.word(index, exclude=same[truth]) for index, truth in enumerate(self.label)]
        self.written = np.array(words, dtype=np.str_)
        numbers = {name.casefold(): number for number, name in enumerate(self.class_names)}
        numbers |= {name: number for number, name in enumerate(self.class_names)}
        named = [numbers.get(word, numbers.get(word.casefold(), -1)) for word in words]
        self.word = np.array(named, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.label)

    def through(self, processor: Any) -> RobustnessImages:
        """The same images as another processor shows them to its model."""
        other = copy.copy(self)
        other.processor, other._kept, other._room = processor, {}, 0
        return other

    def picture(self, index: int) -> Image.Image:
        """The typographic image of an item, RGB, before the processor."""
        return self.attack.draw(self._read(index), str(self.written[index]), index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pixels Tensor[3, H, W] under each name of `variants`, and label, word and cluster as integers."""
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


def _clusters(dataset: Dataset, cluster_column: str | None) -> np.ndarray:
    if cluster_column is None:
        return np.arange(len(dataset))
    if cluster_column not in dataset.column_names:
        raise ValueError(
            f"cluster_column={cluster_column!r} is no column of the data set; it has {dataset.column_names}."
        )
    values = list(dataset.with_format(None)[cluster_column])
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.int64)


@dataclass(frozen=True)
class Answers:
    """What models answered about the images of a `RobustnessImages`, N items long.

    Attributes:
        class_names: Names of the classes.
        label: Array [N] of true classes.
        word: Array [N], the class that the written word names; -1 where it names none.
        written: Array [N] of the written words.
        cluster: Array [N] of cluster numbers.
        predicted: By model and by variant, array [N] of answered classes.
    """

    class_names: tuple[str, ...]
    label: np.ndarray
    word: np.ndarray
    written: np.ndarray
    cluster: np.ndarray
    predicted: Mapping[str, Mapping[str, np.ndarray]]

    def of(self, model: str) -> Mapping[str, np.ndarray]:
        """Answers of one model, by variant.

        Raises:
            ValueError: No such model was asked.
        """
        if model not in self.predicted:
            raise ValueError(f"No answers of model {model!r}; there are those of {list(self.predicted)}.")
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
    """Ask several models about the same images in one pass: each image is drawn and processed once.

    Args:
        models: CLIPModels, or PeftModels around one, by name, each on any device. They share the processor of
            `images`.
        images: The images.
        templates: Prompts with one `{}`, as for `class_embeddings`.
        class_embeds: By model, Tensor[C, D], unit-norm: what stands for the classes in place of the templates.
        batch_size: Items per batch and process, >= 1; a model sees as many images at a time.
        num_workers: Processes that draw images, 0 for none besides this one.
        accelerator: Shares the items out among its processes; every process gets all answers, the same for
            any number of them. None for this process alone.
        disable_tqdm: Shows no progress bar.

    Returns:
        The answers to the variants of every item.

    Raises:
        ValueError: No models; an image can't be read; templates as for `class_embeddings`.
        TypeError: As for `clip_po.policy.dual_encoder`.
    """
    if not models:
        raise ValueError("models is empty; give at least one model by its name.")
    given = class_embeds or {}
    texts = {
        name: given[name]
        if name in given
        else class_embeddings(model, images.processor, images.class_names, templates)
        for name, model in models.items()
    }

    def answers(batch: dict[str, Tensor]) -> Tensor:
        columns = [
            classify(model, batch[variant], texts[name]).argmax(dim=1).cpu()
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
    return Answers(images.class_names, images.label, images.word, images.written, images.cluster, predicted)


def _fooled(means: Mapping[str, np.ndarray]) -> np.ndarray:
    return means["fooled"] / means["word_is_class"]


def _recovery(means: Mapping[str, np.ndarray]) -> np.ndarray:
    lost = means["base_clean"] - means["base_typographic"]
    # Where the words cost the base nothing there is nothing to get back; a negative share would mislead.
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
    """The metrics of one model, with intervals over clusters; against a base, paired on the same images.

    - clean_accuracy, typographic_accuracy, occluded_accuracy: shares of right answers, 0..1.
    - fooled: share of the typographic images answered by the written word's class, among those whose word
      names a class, 0..1; nan where none does.
    - reading_effect: occluded minus typographic accuracy, what the word's meaning costs beyond its ink.
    - kept_answers: share of the typographic images answered as the same model answers the clean image.
    - blank_accuracy: share of right answers with a box without a word, where the images had that variant.
    - recovery: (typographic - base typographic) / (base clean - base typographic), the share of the loss
      that was won back: 0 none, 1 all; nan where the words cost the base nothing.
    - clean_cost: 100 (base clean - clean), in percentage points; negative where clean accuracy rose.

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
        ValueError: A model of that name was not asked.

    Source: clean and typographic accuracy before and after alignment, as Afzali et al. 2025, arXiv
    2411.08923, report them; recovery and clean cost put the four into two numbers.
    """
    said = answers.of(model)
    columns = {variant: got == answers.label for variant, got in said.items()}
    names_class = answers.word >= 0
    columns["word_is_class"] = names_class
    columns["fooled"] = names_class & (said["typographic"] == answers.word)
    columns["kept"] = said["typographic"] == said["clean"]
    metrics = dict(_METRICS)
    if BLANK in said:
        metrics |= _METRICS_IF_BLANK
    if base is not None and base != model:
        columns |= {f"base_{variant}": got == answers.label for variant, got in answers.of(base).items()}
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
"""Metrics in the order of `robustness_table`, and what heads their columns."""


def robustness_table(reports: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Reports of models side by side, as a Markdown table.

    Args:
        reports: By name of the model, as from `robustness_report`.

    Returns:
        One row a model, one column a metric, with intervals in brackets.
    """
    metrics = [name for name in COLUMNS if any(name in found for found in reports.values())]
    rows = [[model, *(found.get(name) for name in metrics)] for model, found in reports.items()]
    return format_table(["model", *(COLUMNS[name] for name in metrics)], rows)
