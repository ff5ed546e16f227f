"""Zero-shot accuracy on photographs with words and without, among several candidate sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.class_labels import column_texts
from clip_po.data.images import read_image, read_images, to_pixels
from clip_po.encoding import evaluating
from clip_po.evaluation.bootstrap import Estimate, Statistic, bootstrap_interval, mean_over_sets
from clip_po.evaluation.class_doubles import first_alike
from clip_po.evaluation.robustness import Answers
from clip_po.evaluation.zero_shot import classify, collect_answers, embed_classes

CANDIDATES = ("all", "labels", "pair")
"""Candidate sets: all labels and words, labels only, or the label and word of each image."""

VARIANTS = ("typographic", "clean")
"""Photographs with words, or of the same objects without."""


def candidate_sets(dataset: Dataset, kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the texts among which photographs with words are classified, by kind.

    Args:
        dataset: All rows, as from a loader of `LAYOUTS`; a sample may lack candidates.
        kinds: Some of `CANDIDATES`. "all" are the names of the ClassLabel; "labels" are the names that label a row;
            with "pair" each image has two of the returned texts, its label and its word.

    Returns:
        Texts by kind.
    """
    names = tuple(dataset.features["label"].names)
    labels, words = column_texts(dataset, "label"), column_texts(dataset, "word")
    sets = {
        "all": names,
        "labels": tuple(name for name in names if name in set(labels)),
        "pair": tuple(sorted({*labels, *words} - {""})),
    }
    return {kind: sets[kind] for kind in kinds}


def ask_photographs(
    models: Mapping[str, Any],
    processor: Any,
    dataset: Dataset,
    candidates: Mapping[str, Sequence[str]],
    templates: Sequence[str],
    *,
    variant: str = "typographic",
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
    title: str = "Photographs",
) -> dict[str, Answers]:
    """Classify photographs among each candidate set with several models, in one pass over the images.

    Args:
        models: Two-tower models, or PeftModels around one, by name. They share the processor.
        processor: Processor of the models.
        dataset: Columns `image`, `label` (ClassLabel) and, for photographs with words, `word`.
        candidates: From `candidate_sets`. If both texts of a pair are equally near, the answer is the word.
        templates: Prompts with one `{}`, as for `class_embeddings`.
        variant: One of `VARIANTS`, the name of the images in the answers.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        accelerator: Divides the images among its processes; every process gets all answers.
        disable_tqdm: Whether to hide the progress bar.
        title: Label of the progress bar.

    Returns:
        Answers by kind of candidate set. Their `word` is -1 if the written word is not a candidate.

    Raises:
        ValueError: If there are no models or no candidate sets, a label is not a candidate, or as for
            `class_embeddings`.
    """
    if not models or not candidates:
        raise ValueError("models and candidates are empty. Give at least one model and one candidate set by name.")
    texts = list(dict.fromkeys(text for names in candidates.values() for text in names))
    place = {text: number for number, text in enumerate(texts)}
    labels = column_texts(dataset, "label")
    words = column_texts(dataset, "word") if "word" in dataset.column_names else [""] * len(dataset)
    missing = set(labels) - set(texts)
    if missing:
        raise ValueError(f"The labels {sorted(missing)[:5]} are not candidates. Give the candidate sets of all rows.")
    label = np.array([place[text] for text in labels], dtype=np.int64)
    word = np.array([place.get(text, -1) for text in words], dtype=np.int64)
    allowed = {kind: torch.tensor([text in set(names) for text in texts]) for kind, names in candidates.items()}
    embeds = embed_classes(models, processor, texts, templates)
    first = {
        name: {kind: _first_allowed(table.cpu(), known) for kind, known in allowed.items()}
        for name, table in embeds.items()
    }

    def answers(batch: dict[str, Tensor]) -> Tensor:
        columns = []
        for name, model in models.items():
            logits = classify(model, batch["pixel_values"], embeds[name]).cpu()
            for kind in candidates:
                if kind == "pair":
                    columns.append(_nearer(logits, batch["label"], batch["word"]))
                else:
                    answer = logits.masked_fill(~allowed[kind], -torch.inf).argmax(dim=1)
                    columns.append(first[name][kind][answer])
        return torch.stack(columns, dim=1)

    with evaluating(*models.values()):
        table = collect_answers(
            _Photographs(dataset, processor, label, word),
            answers,
            len(models) * len(candidates),
            batch_size,
            num_workers,
            accelerator,
            disable_tqdm,
            title,
        ).reshape(len(dataset), len(models), len(candidates))
    found = {}
    for column, kind in enumerate(candidates):
        # In a pair, the word of the image is always one of the two candidates.
        is_candidate = np.array([number >= 0 and bool(allowed[kind][number]) for number in word])
        predicted = {name: {variant: table[:, position, column]} for position, name in enumerate(models)}
        rows = np.arange(len(dataset))
        found[kind] = Answers(tuple(texts), label, np.where(is_candidate, word, -1), np.array(words), rows, predicted)
    return found


def _first_allowed(text_embeds: Tensor, allowed: Tensor) -> Tensor:
    """Return for each allowed text the first allowed one with the same embedding, Tensor[C]."""
    numbers = allowed.nonzero().flatten()
    first = torch.arange(len(allowed))
    first[numbers] = numbers[first_alike(text_embeds[numbers])]
    return first


def _nearer(logits: Tensor, label: Tensor, word: Tensor) -> Tensor:
    # Without a written word there is no second candidate; the label replaces it.
    other = torch.where(word >= 0, word, label)
    two = logits.gather(1, torch.stack([label, other], dim=1))
    return torch.where(two[:, 0] > two[:, 1], label, other)


class _Photographs(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset, processor: Any, label: np.ndarray, word: np.ndarray) -> None:
        self.images, self.processor, self.label, self.word = read_images(dataset, "image"), processor, label, word

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixels = to_pixels(self.processor, [read_image(self.images, "image", row)])[0]
        return {"pixel_values": pixels, "label": self.label[row], "word": self.word[row]}


def attacked_rows(answers: Answers) -> np.ndarray:
    """Return which images can be answered with their written word, the images that `fooled` is a share of.

    Args:
        answers: N answers, from `ask_photographs`.

    Returns:
        Array [N] of booleans: the word is a candidate, and it is not the label.
    """
    return (answers.word >= 0) & (answers.word != answers.label)


def accuracy_report(
    answers: Answers,
    model: str,
    base: str | None = None,
    variant: str = "typographic",
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute the accuracy of one model on one variant of images; against a base, paired on the same images.

    - <variant>_accuracy: share of right answers, 0..1.
    - fooled: share of images classified as the written word, among those whose word is a candidate other than the
      label, 0..1; for typographic images only; nan if there are none.
    - difference: 100 (accuracy - base accuracy), in percentage points.

    Args:
        answers: From `ask_photographs`, or from `evaluate_robustness`.
        model: Name of the model.
        base: Name of the model before alignment; None, or the model itself, for no difference.
        variant: Name of the images in the answers.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: If there are no answers of the model or the base.
    """
    got = answers.predictions_of(model)[variant]
    attacked = attacked_rows(answers)
    columns = {"right": got == answers.label, "attacked": attacked, "fooled": attacked & (got == answers.word)}
    metrics: dict[str, Statistic] = {f"{variant}_accuracy": lambda means: means["right"]}
    if variant == "typographic":
        metrics["fooled"] = lambda means: means["fooled"] / means["attacked"]
    if base is not None and base != model:
        columns["base"] = answers.predictions_of(base)[variant] == answers.label
        metrics["difference"] = lambda means: 100 * (means["right"] - means["base"])
    return {
        name: bootstrap_interval(statistic, columns, answers.cluster, confidence, resamples, seed)
        for name, statistic in metrics.items()
    }


def mean_report(
    answers: Sequence[Answers],
    model: str,
    base: str | None = None,
    variant: str = "clean",
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute the mean accuracy over datasets; each dataset counts once, whatever its size.

    - mean_accuracy: mean of the accuracies, 0..1.
    - mean_difference: 100 (mean accuracy - mean accuracy of the base), in percentage points.

    Args:
        answers: Answers on each dataset. The interval is over images; the datasets are held fixed.
        model: As for `accuracy_report`.
        base: As for `accuracy_report`.
        variant: As for `accuracy_report`.
        confidence: As for `bootstrap_interval`.
        resamples: As for `bootstrap_interval`.
        seed: As for `bootstrap_interval`.

    Returns:
        Estimates by metric, in the order above.

    Raises:
        ValueError: If there are no answers of the model or the base, or no datasets.
    """
    if not answers:
        raise ValueError("answers is empty. Give the answers on at least one dataset.")
    how: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    right = [found.predictions_of(model)[variant] == found.label for found in answers]
    metrics = {"mean_accuracy": mean_over_sets(right, **how)}
    if base is not None and base != model:
        was = [found.predictions_of(base)[variant] == found.label for found in answers]
        gains = [100.0 * now - 100.0 * before for now, before in zip(right, was, strict=True)]
        metrics["mean_difference"] = mean_over_sets(gains, **how)
    return metrics
