"""Hard candidates: of each row, the wrong texts or images that a reference scores highest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from torch import Tensor
from transformers.utils import logging

from clip_po.candidates import CandidateTexts
from clip_po.data.embedding_cache import fingerprint, model_digest, processor_digest
from clip_po.data.images import probe_image
from clip_po.data.stored_images import decode_stored, image_identity
from clip_po.scoring.scorer import Scorer
from clip_po.text_identity import TextTokens
from clip_po.validation import COUNT, FINITE, check_column, check_number, check_text

logger = logging.get_logger(__name__)

_ANCHORS_AT_ONCE = 1024
_IMAGES_AT_ONCE = 256


def hard_texts(
    dataset: Dataset,
    scorer: Scorer,
    k: int,
    *,
    texts: Sequence[str] | None = None,
    label_column: str | None = None,
    margin: float | None = None,
) -> Dataset:
    """Add to each row the wrong texts with the highest cosine to its image under a reference, as rejected texts.

    A text is not wrong if the model can't tell it from the chosen text, or if it is the chosen text of a row with the
    same label.

    Args:
        dataset: Rows with `image` and `chosen`, and optionally `rejected`, a text or a list of texts.
        scorer: The reference: the checkpoint that training starts from.
        k: Largest number of texts to add to a row, >= 1.
        texts: The texts to choose from. Default: the chosen texts of all rows.
        label_column: Column of the label of a row; None if rows have none.
        margin: Smallest difference in cosine from the chosen text down to a wrong one. It leaves out texts that may be
            right too. None for no limit.

    Returns:
        The rows with `rejected` as a list: what was there, then the added texts, the hardest first. Rows without any
        rejected text are left out. `datasets.Dataset.map` caches the embeddings of the images, by the images and
        everything that the embeddings depend on.

    Raises:
        ValueError: If a column is missing, a text is empty, or no row has a wrong text.
        UnreadableImage: If an image can't be read. The message names the row.

    Source: Hard negatives by a model: Xiong et al. 2021, arXiv 2007.00808.
    """
    _check(dataset, ("image", "chosen"), label_column, k, margin)
    chosen = list(dataset["chosen"])
    for row, text in enumerate(chosen):
        check_text(text, f"chosen of row {row}", "Give each row its chosen text.")
    identity = CandidateTexts(None, TextTokens.of(scorer.processor, scorer.model)).identity
    pool = _Pool.of([*chosen, *(texts or ())], identity)
    own = [pool.place[identity(text)] for text in chosen]
    offered = [pool.place[identity(text)] for text in (chosen if texts is None else texts)]
    right = _right_candidates(own, _column(dataset, label_column))
    found = _hardest(
        embed_column(dataset, "image", scorer),
        scorer.embed_texts(pool.entries),
        own,
        [right[row] for row in range(len(chosen))],
        sorted(set(offered)),
        k,
        margin,
    )
    given = [_as_list(value) for value in _column(dataset, "rejected", missing=[None] * len(chosen))]
    rejected = [
        [*texts, *(pool.entries[n] for n in places if identity(pool.entries[n]) not in {*map(identity, texts)})]
        for texts, places in zip(given, found, strict=True)
    ]
    return _with_rejected(dataset, "rejected", List(Value("string")), rejected)


def hard_images(
    dataset: Dataset,
    scorer: Scorer,
    k: int,
    *,
    label_column: str | None = None,
    margin: float | None = None,
) -> Dataset:
    """Add to each row the wrong images with the highest cosine to its text under a reference, as rejected images.

    The images to choose from are the chosen images of all rows. An image is not wrong if it is stored twice and one of
    the two is the chosen image, or if its row has the same text or the same label.

    Args:
        dataset: Rows with `text` and `chosen_image`, and optionally `rejected_image`, an image or a list of images.
        scorer: As for `hard_texts`.
        k: Largest number of images to add to a row, >= 1.
        label_column: As for `hard_texts`.
        margin: As for `hard_texts`.

    Returns:
        The rows with `rejected_image` as a list, as from `hard_texts`. An image is stored again in each row that
        rejects it.

    Raises:
        ValueError: If a column is missing, a text is empty, or no row has a wrong image.
        UnreadableImage: If an image can't be read. The message names the row.

    Source: As for `hard_texts`.
    """
    _check(dataset, ("text", "chosen_image"), label_column, k, margin)
    texts = list(dataset["text"])
    for row, text in enumerate(texts):
        check_text(text, f"text of row {row}", "Give each row its text.")
    identity = CandidateTexts(None, TextTokens.of(scorer.processor, scorer.model)).identity
    stored = dataset.cast_column("chosen_image", ImageFeature(decode=False))
    images = list(stored["chosen_image"])
    pool = _Pool.of(list(range(len(images))), lambda row: image_identity(images[row]))
    own = [pool.place[image_identity(image)] for image in images]
    groups = [_right_candidates(own, column) for column in ([*map(identity, texts)], _column(dataset, label_column))]
    embeds = embed_column(dataset, "chosen_image", scorer)
    found = _hardest(
        scorer.embed_texts(texts),
        embeds[torch.tensor(pool.entries)],
        own,
        [set().union(*(right[row] for right in groups)) for row in range(len(texts))],
        list(range(len(pool.entries))),
        k,
        margin,
    )
    if "rejected_image" in dataset.column_names:
        several = isinstance(dataset.features["rejected_image"], List)
        kept = ImageFeature(decode=False)
        stored = stored.cast_column("rejected_image", List(kept) if several else kept)
    given = [_as_list(value) for value in _column(stored, "rejected_image", missing=[None] * len(texts))]
    rejected = [
        [*there, *(images[pool.entries[n]] for n in places)] for there, places in zip(given, found, strict=True)
    ]
    return _with_rejected(dataset, "rejected_image", List(ImageFeature()), rejected)


def embed_column(dataset: Dataset, column: str, scorer: Scorer) -> Tensor:
    """Embed the images of a column. `datasets.Dataset.map` caches the embeddings.

    Args:
        dataset: One split with N rows.
        column: Column of images.
        scorer: The model.

    Returns:
        Tensor[N, D], unit-norm, float32, on the device of the model.

    Raises:
        UnreadableImage: If an image can't be read. The message names the row.
    """
    embed = _Embed(scorer, column, dataset.features[column])
    alone = dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
    found = alone.map(
        embed,
        with_indices=True,
        batched=True,
        batch_size=_IMAGES_AT_ONCE,  # a part of the name of the cached result, as that of the scorer is not
        remove_columns=[column],
        features=Features({"embedding": List(Value("float32"))}),
        desc="Reference on " + column,
    )
    return torch.as_tensor(found.with_format("torch")[:]["embedding"]).to(scorer.model.device)


class _Embed:
    """A function for `Dataset.map`. Its pickle, by which `datasets` names the cached result, holds digests alone."""

    def __init__(self, scorer: Scorer, column: str, feature: ImageFeature) -> None:
        self.scorer, self.column, self.feature = scorer, column, feature

    def __getstate__(self) -> dict[str, str]:
        """Everything that the embeddings depend on, apart from the images. The probe shows what no weight does."""
        probe = self.scorer.embed_images([probe_image()])
        parts = model_digest(self.scorer.model), processor_digest(self.scorer.processor)
        return {"digest": fingerprint(*parts, str(self.scorer.precision), str(probe.tolist()), repr(self.feature))}

    def __call__(self, batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Embed the images of a batch."""
        images = [
            decode_stored(value, self.feature, repr(self.column), f"Row {row}")
            for row, value in zip(rows, batch[self.column], strict=True)
        ]
        return {"embedding": self.scorer.embed_images(images).cpu().numpy()}


@dataclass(frozen=True)
class _Pool:
    """Candidates, each once.

    Attributes:
        entries: The first of all candidates with one identity.
        place: Position in `entries`, by identity.
    """

    entries: list[Any]
    place: Mapping[Hashable, int]

    @classmethod
    def of(cls, candidates: Sequence[Any], identity: Any) -> _Pool:
        first: dict[Hashable, Any] = {}
        for candidate in candidates:
            first.setdefault(identity(candidate), candidate)
        return cls([*first.values()], {known: place for place, known in enumerate(first)})


def _right_candidates(own: Sequence[int], group: Sequence[Hashable]) -> list[set[int]]:
    """Return the candidates of each row that are those of a row of the same group. None is no group."""
    members: dict[Hashable, set[int]] = {}
    for place, name in zip(own, group, strict=True):
        members.setdefault(name, set()).add(place)
    return [{place} if name is None else members[name] for place, name in zip(own, group, strict=True)]


def _hardest(
    anchors: Tensor,
    candidates: Tensor,
    own: Sequence[int],
    right: Sequence[set[int]],
    offered: Sequence[int],
    k: int,
    margin: float | None,
) -> list[list[int]]:
    """Return the positions of the k offered candidates of each row with the highest cosines, the highest first."""
    closed = torch.ones(len(candidates), dtype=torch.bool, device=candidates.device)
    closed[list(offered)] = False
    found: list[list[int]] = []
    for start in range(0, len(anchors), _ANCHORS_AT_ONCE):
        rows = range(start, min(start + _ANCHORS_AT_ONCE, len(anchors)))
        cosines = anchors[rows.start : rows.stop].to(candidates.device) @ candidates.T
        places = torch.tensor(own[rows.start : rows.stop], device=cosines.device).unsqueeze(-1)
        excluded = closed.expand_as(cosines).clone()
        if margin is not None:
            excluded |= cosines > cosines.gather(-1, places) - margin
        pairs = [(row - start, place) for row in rows for place in right[row]]
        excluded[tuple(zip(*pairs, strict=True))] = True
        best = cosines.masked_fill(excluded, -torch.inf).topk(min(k, len(candidates)), dim=-1)
        kept = best.values > -torch.inf
        found += [best.indices[row][kept[row]].tolist() for row in range(len(kept))]
    return found


def _check(dataset: Dataset, columns: Sequence[str], label_column: str | None, k: int, margin: float | None) -> None:
    for column in (*columns, *([] if label_column is None else [label_column])):
        check_column(dataset, column, "dataset")
    check_number("k", k, COUNT)
    if margin is not None:
        check_number("margin", margin, FINITE)


def _column(dataset: Dataset, name: str | None, missing: Sequence[Any] | None = None) -> Sequence[Any]:
    """Return the values of a column; None for every row, or `missing`, if there is none."""
    if name is not None and name in dataset.column_names:
        return list(dataset[name])
    return [None] * len(dataset) if missing is None else missing


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _with_rejected(dataset: Dataset, column: str, feature: Any, rejected: Sequence[list[Any]]) -> Dataset:
    """Replace a column, and leave out rows without any rejected candidate."""
    kept = [row for row, values in enumerate(rejected) if values]
    if not kept:
        raise ValueError(
            "No row has a wrong candidate: all of them have one text, one label, or a cosine within the margin. Give "
            "more texts or other rows, or a lower margin."
        )
    if len(kept) < len(rejected):
        logger.warning(
            f"{len(rejected) - len(kept)} of {len(rejected)} rows have no wrong candidate and are left out."
        )
    others = dataset.remove_columns([name for name in dataset.column_names if name == column])
    values = [rejected[row] for row in kept]
    return others.select(kept).add_column(column, values, feature=feature)
