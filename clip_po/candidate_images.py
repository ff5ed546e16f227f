"""The images of the global batch as candidates of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from clip_po.losses.global_batch import processes


@dataclass(frozen=True)
class OwnCandidates:
    """The images of a process, and which of its images and texts belong to rows that count.

    Padding and rows with unreadable images do not count.

    Attributes:
        identities: A number for each image, the same for images that are one.
        counted: Whether the row of each image counts.
        texts: Positions of the texts of rows that count.
        anchored: Whether a row chooses among images.
    """

    identities: list[int]
    counted: list[bool]
    texts: set[int]
    anchored: bool

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> OwnCandidates:
        """Return those of a batch. There are no images if no row of the dataset chooses among images."""
        rows = batch["counted"] > 0
        texts = set(batch["candidates"][rows].flatten().tolist())
        if "image_ids" not in batch:
            return cls([], [], texts, False)
        counted = rows[rows_of_images(batch)].tolist()
        return cls(batch["image_ids"].tolist(), counted, texts, "candidate_images" in batch)


def rows_of_images(batch: Mapping[str, Any]) -> Tensor:
    """Return the row of each image of a batch.

    Args:
        batch: Batch of `DataCollatorForContrastivePreference`.

    Returns:
        Tensor[P], ascending.
    """
    if "candidate_images" not in batch:
        return torch.arange(len(batch["weight"]), device=batch["weight"].device)
    starts = batch["candidate_images"][:, 0].contiguous()  # the images of a row come one after the other
    images = torch.arange(len(batch["image_ids"]), device=starts.device)
    return torch.searchsorted(starts, images, right=True) - 1


def in_batch_images(
    batch: Mapping[str, Any], shared: Mapping[str, Any], texts: Tensor, images: Sequence[OwnCandidates]
) -> dict[str, Any]:
    """Make every image of the global batch a candidate of each row that is anchored at its text.

    Args:
        batch: The rows of this process, as for `in_batch_candidates`.
        shared: The same rows with the positions of texts among those of all processes.
        texts: Tensor[B, N], positions of the row's own candidate texts among those of all processes.
        images: The images of each process.

    Returns:
        `shared` with `candidates` and `candidate_images`, Tensor[B, N] each: positions among the texts and the images
        of all processes, N the larger number of the two, -1 for none. An image that is there twice is a candidate
        once, and images of rows that do not count are none, except in their own row. `chosen` and `rejected` of these
        rows are positions among the images. `images_of_processes` is the number of images of each process.
    """
    rank = distributed.get_rank() if len(images) > 1 else 0
    counts = [len(found.identities) for found in images]
    place, kept = _first_counted(images, texts.device)
    own = batch["candidate_images"] if "candidate_images" in batch else rows_of_images(batch).unsqueeze(-1)
    own_images = own.clamp(min=0) + sum(counts[:rank])
    anchored = anchored_at_text(own)
    at_text = anchored.unsqueeze(-1)
    chosen, rejected = batch["chosen"].where(anchored, -1), batch["rejected"].where(at_text, -1)

    numbers = torch.arange(max(len(shared["texts"]), len(place)), device=texts.device).expand(len(own), -1)
    own_places = place[own_images].where(own >= 0, place[own_images[:, :1]])
    present = F.pad(kept, (0, numbers.shape[1] - len(kept))).repeat(len(own), 1).scatter(1, own_places, True)
    is_text = numbers < len(shared["texts"])
    return {
        **shared,
        "candidates": torch.where(at_text, texts[:, :1], numbers.where(is_text, -1)),
        "candidate_images": torch.where(at_text, numbers.where(present, -1), own_images[:, :1]),
        "chosen": torch.where(
            anchored, own_places.gather(-1, chosen.clamp(min=0).unsqueeze(-1)).squeeze(-1), shared["chosen"]
        ),
        "rejected": torch.where(
            at_text, own_places.gather(-1, rejected.clamp(min=0)).masked_fill(rejected < 0, -1), shared["rejected"]
        ),
        "images_of_processes": counts,
    }


def anchored_at_text(candidate_images: Tensor) -> Tensor:
    """Return which rows choose among images.

    Args:
        candidate_images: Tensor[B, N], the images of the row's own candidates, -1 for none.

    Returns:
        Tensor[B] of bool. A row that is anchored at its image has that alone.
    """
    return ((candidate_images != candidate_images[:, :1]) & (candidate_images >= 0)).any(dim=-1)


def _first_counted(images: Sequence[OwnCandidates], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the position at which each image is a candidate, and which positions those are, of rows that count."""
    identities = [number for found in images for number in found.identities]
    counted = [count for found in images for count in found.counted]
    first: dict[int, int] = {}
    for position in sorted(range(len(identities)), key=lambda position: not counted[position]):
        first.setdefault(identities[position], position)
    places = [first[number] for number in identities]
    kept = [place == position and counted[position] for position, place in enumerate(places)]
    return torch.tensor(places, device=device), torch.tensor(kept, device=device)


def images_of_all(embeds: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Gather the embeddings of the images of all processes if rows choose among them.

    Args:
        embeds: Tensor[P, D], the images of this process.
        batch: The batch; `images_of_processes` says how many images each process has.

    Returns:
        Tensor[images of all processes, D]; `embeds` itself with a single process, or without that key. Gradients flow
        back to the process that an image comes from.
    """
    counts = batch.get("images_of_processes", [])
    if len(counts) < 2:
        return embeds
    padded = F.pad(embeds, (0, 0, 0, max(counts) - len(embeds)))
    return torch.cat([found[:count] for found, count in zip(all_gather(padded), counts, strict=True)])


def gather_objects(own: Any) -> list[Any]:
    """Return the objects of all processes, each of which must call this.

    Args:
        own: Anything that pickles.

    Returns:
        One object for each process, in their order.
    """
    if processes() == 1:
        return [own]
    found = [None] * processes()
    distributed.all_gather_object(found, own)
    return found
