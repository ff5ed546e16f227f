"""Drift: how far a model has moved from its base on any images, over an open vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from clip_po.data.bad_images import OnBadImage
from clip_po.data.images import read_images
from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.encoding import encode_images, encode_texts, evaluating
from clip_po.evaluation.bootstrap import Estimate, bootstrap_interval
from clip_po.evaluation.evaluator import Evaluator, Metrics, result_of
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.robustness import read_clusters
from clip_po.evaluation.zero_shot import CleanImages, collect_answers
from clip_po.models import check_processor
from clip_po.text_identity import TextTokens, TokenIds

_CELLS_AT_ONCE = 2_000_000  # Number of log-probabilities held in memory at a time: 16 MB.


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of images and texts under one model.

    Attributes:
        texts: C texts, no two of which have the same token ids.
        image_embeds: Array [N, D], float32, unit-norm.
        text_embeds: Array [C, D], float32, unit-norm.
        logit_scale: The factor of the cosines, > 0.
    """

    texts: tuple[str, ...]
    image_embeds: np.ndarray
    text_embeds: np.ndarray
    logit_scale: float

    def log_probabilities(self, rows: slice) -> np.ndarray:
        """Return the log-probabilities of the texts for some images.

        Args:
            rows: The images.

        Returns:
            Array [len(rows), C], float64, in nats.
        """
        images, texts = (embeds.astype(np.float64) for embeds in (self.image_embeds[rows], self.text_embeds))
        return torch.from_numpy(self.logit_scale * images @ texts.T).log_softmax(dim=1).numpy()


@dataclass
class DriftEvaluator(Evaluator[Embeddings]):
    """Evaluates how far models have moved from their base on images, which need no labels.

    - kl: KL(base || model) of the probabilities of the texts, mean over the images, in nats; 0 if nothing has changed.
    - agreement: share of images whose most probable text is the base's, 0..1.
    - cosine: mean cosine of the image embedding with the base's, -1..1; missing if the embeddings of the two models
      differ in size.

    The base has none of these metrics, and without a base no model has any.

    Args:
        dataset: One split with images.
        processor: Processor of the models.
        texts: The texts that the models choose among, such as from `open_vocabulary`. Of texts with the same token ids
            the first one is used.
        image_column: Name of the image column.
        cluster_column: Name of the column that identifies related rows (scene, object, subject), for the intervals;
            None if rows are independent.
        batch_size: Images per batch and process, >= 1.
        num_workers: Number of worker processes that read images, >= 0.
        resamples: Number of bootstrap resamples for the intervals, >= 1.
        seed: Seed of the resamples.
        title: Label of the progress bar.
        on_bad_image: "raise" stops at an image that can't be read. "skip" leaves such rows out, as `readable_rows`
            does, in the constructor and in every process.

    Attributes:
        skipped_rows: Number of rows left out.

    Raises:
        ValueError: If there are no texts, a column is missing, or as for `readable_rows`.
        TypeError: If `dataset` is not a single split.
    """

    dataset: Dataset
    processor: Any
    texts: Sequence[str]
    image_column: str = "image"
    cluster_column: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    resamples: int = 1000
    seed: int = 0
    title: str = "Drift"
    on_bad_image: OnBadImage = "raise"
    skipped_rows: int = field(default=0, init=False)
    primary_metric = "kl"
    greater_is_better = False

    def __post_init__(self) -> None:
        """Check the texts and columns, and leave out the rows whose images can't be read, if the arguments say so."""
        if isinstance(self.texts, str) or len(self.texts) < 2:
            raise ValueError(f"texts must be a list of at least two texts, got {self.texts!r}.")
        read_images(self.dataset, self.image_column)
        rows = readable_rows(self.dataset, self.image_column, self.on_bad_image, num_workers=self.num_workers)
        self.dataset, self.skipped_rows = rows, len(self.dataset) - len(rows)
        self._clusters = read_clusters(rows, self.cluster_column)

    def measure(
        self, models: Mapping[str, Any], *, accelerator: Accelerator | None = None, disable_tqdm: bool = False
    ) -> dict[str, Embeddings]:
        """Embed the texts and, in one pass for all models, the images.

        Args:
            models: As for `Evaluator.measure`. They share the processor.
            accelerator: As for `Evaluator.measure`.
            disable_tqdm: As for `Evaluator.measure`.

        Returns:
            The embeddings by model.

        Raises:
            ValueError: If there are no models, an image is not readable, or as for `encode_texts`.
            TypeError: As for `check_processor`.
        """
        if not models:
            raise ValueError("models is empty. Give at least one model by name.")
        texts = {name: self._distinct_texts(model) for name, model in models.items()}
        text_embeds = {name: encode_texts(model, self.processor, texts[name]) for name, model in models.items()}

        def embed(batch: dict[str, Tensor]) -> Tensor:
            pixels = batch["pixel_values"]
            encoders = map(dual_encoder, models.values())
            return torch.cat([encode_images(clip, pixels.to(clip.device, clip.dtype)).cpu() for clip in encoders], 1)

        sizes = [embeds.shape[1] for embeds in text_embeds.values()]
        images = CleanImages(read_images(self.dataset, self.image_column), self.image_column, self.processor)
        with evaluating(*models.values()):
            table = collect_answers(
                images,
                embed,
                sum(sizes),
                self.batch_size,
                self.num_workers,
                accelerator,
                disable_tqdm,
                self.title,
                torch.float32,
            )
        parts = np.split(table, np.cumsum(sizes)[:-1], axis=1)
        return {
            name: Embeddings(
                tuple(texts[name]),
                part,
                text_embeds[name].float().cpu().numpy(),
                as_dual_encoder(model).scale.item(),
            )
            for (name, model), part in zip(models.items(), parts, strict=True)
        }

    def _distinct_texts(self, model: Any) -> list[str]:
        """Return the texts that a model can tell apart."""
        check_processor(self.processor, model)
        tokens = TextTokens.of(self.processor, model)
        tokens.warn_of_cut(tokens.learn(self.texts), "texts")
        first: dict[TokenIds, str] = {}
        for text in self.texts:
            first.setdefault(tokens(text), text)
        return list(first.values())

    def report(
        self, measured: Mapping[str, Embeddings], base: str | None, resamples: int, confidence: float = 0.95
    ) -> Metrics:
        """Compare the models with the base.

        Args:
            measured: Results by model, as from `measure`.
            base: As for `Evaluator.report`. It must be among `measured`.
            resamples: As for `bootstrap_interval`.
            confidence: As for `bootstrap_interval`. The upper end of a 90% interval is that of a one-sided 95%
                interval.

        Returns:
            Estimates by model and metric; none for the base and, without a base, for all models.

        Raises:
            ValueError: If `base` is not among `measured`, the models read other texts or images than the base, or as
                for `bootstrap_interval`.
        """
        before = result_of(base, measured)
        found: Metrics = {name: {} for name in measured}
        if before is None:
            return found
        for name in measured.keys() - {base}:
            columns = compare_embeddings(before, measured[name])
            found[name] = {
                metric: _mean(metric, column, self._clusters, confidence, resamples, self.seed)
                for metric, column in columns.items()
            }
        return found


def compare_embeddings(before: Embeddings, after: Embeddings) -> dict[str, np.ndarray]:
    """Compare two models image by image.

    Args:
        before: The embeddings of the base.
        after: Those of another model, of the same images and texts.

    Returns:
        Arrays [N] of numbers: `kl`, `agreement` (0 or 1) and, if the embeddings have the same size, `cosine`.

    Raises:
        ValueError: If the texts or the number of images differ.
    """
    images = len(before.image_embeds)
    if before.texts != after.texts or images != len(after.image_embeds):
        raise ValueError(
            f"The base was measured on {images} images and {len(before.texts)} texts, the model on "
            f"{len(after.image_embeds)} images and {len(after.texts)} texts, or on other texts. Measure both with the "
            "same evaluator. Their text towers must read the same number of tokens."
        )
    kl, agreement = (np.concatenate(parts) for parts in zip(*_divergences(before, after), strict=True))
    columns = {"kl": kl, "agreement": agreement}
    if before.image_embeds.shape == after.image_embeds.shape:
        columns["cosine"] = np.einsum("nd,nd->n", before.image_embeds, after.image_embeds, dtype=np.float64)
    return columns


def _divergences(before: Embeddings, after: Embeddings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield KL(before || after) and whether the most probable text is the same, a part of the images at a time."""
    at_once = max(1, _CELLS_AT_ONCE // len(before.texts))
    for start in range(0, len(before.image_embeds), at_once):
        rows = slice(start, start + at_once)
        was, now = before.log_probabilities(rows), after.log_probabilities(rows)
        yield (np.exp(was) * (was - now)).sum(axis=1), was.argmax(axis=1) == now.argmax(axis=1)


def _mean(
    metric: str, column: np.ndarray, clusters: np.ndarray, confidence: float, resamples: int, seed: int
) -> Estimate:
    return bootstrap_interval(lambda means: means[metric], {metric: column}, clusters, confidence, resamples, seed)
