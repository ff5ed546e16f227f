"""Rows to batches: pixel values, unique texts, and positions in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from clip_po.candidates import CandidateTexts
from clip_po.data.candidate_positions import candidate_positions
from clip_po.data.formats import Row
from clip_po.data.grades import grades_of
from clip_po.data.images import to_pixels

METADATA_KEYS = ("skipped", "stream_mark")
"""Keys of a row that are for the trainer, not for the model."""


class DataCollatorForContrastivePreference:
    """Collator that turns images into pixel values, and texts and images into positions among the candidates.

    Args:
        processor: CLIPProcessor; its image processor makes the pixel values.
        candidate_texts: The candidate texts of every row. By default each row chooses among its `candidates`, or if it
            has none among its chosen and rejected texts.

    Returns a batch of B rows, which hold P images: P = B if each is anchored at its image.

    ====================  =================  ================================================================
    pixel_values          Tensor[P,C,H,W]    images of the preferences
    reg_pixel_values      Tensor[B,C,H,W]    ordinary images, where rows have them
    target_pixel_values   Tensor[B,C,H,W]    the rows' own clean images, where those above are others
    chosen                Tensor[B]          position of the chosen one among the row's candidates, -1 for none
    rejected              Tensor[B, R]       positions of the rejected ones, -1 for none
    weight                Tensor[B]          weight of the preference; 0 for padding
    margin                Tensor[B]          margin of each preference, where rows have one
    label_smoothing       Tensor[B]          probability that each preference is wrong, where rows have one
    counted               Tensor[B]          1 for a row with an image (default), 0 for padding, skipped rows
    reg_row_weight        Tensor[B]          1 where a row comes with an ordinary image, 0 for padding
    texts                 list of M texts    the batch's texts, each once; absent where candidate_texts are given
    candidates            Tensor[B, N]       positions in the texts, -1 for none; absent likewise, unless a row is
                                             anchored at its text
    candidate_images      Tensor[B, N]       positions among the images; absent if all rows are anchored at theirs
    desirable             Tensor[B]          1 for a right, 0 for a wrong text of unpaired feedback, -1 for other rows
    image_ids             Tensor[P]          numbers that tell images apart; the two are there for rows of such kinds
    reg_texts             list of B texts    texts of the ordinary images, where they have some
    ref_image_embeds,     Tensor[P, D]       the reference's embeddings, where they are known already
    ref_reg_image_embeds,
    ref_target_image_embeds
    ====================  =================  ================================================================
    """

    def __init__(
        self, processor: ProcessorMixin, candidate_texts: CandidateTexts | Sequence[str] | None = None
    ) -> None:
        self.processor = processor
        if not isinstance(candidate_texts, CandidateTexts):
            candidate_texts = CandidateTexts(candidate_texts)
        self.candidate_texts = candidate_texts

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make the batch; all rows have the same keys."""
        batch: dict[str, Any] = {}
        for name in ("", "reg_", "target_"):
            if images := [image for row in rows for image in _images(row, f"{name}image")]:  # none if all are embedded
                batch[f"{name}pixel_values"] = to_pixels(self.processor, images)
        for name in ("weight", "reg_row_weight"):
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        batch["counted"] = torch.tensor([row.get("counted", 1.0) for row in rows], dtype=torch.float32)
        batch |= grades_of(rows)
        for name in ("ref_image_embeds", "ref_reg_image_embeds", "ref_target_image_embeds"):
            if name in rows[0]:
                batch[name] = torch.cat([row[name].reshape(-1, row[name].shape[-1]) for row in rows])
        if "desirable" in rows[0]:
            batch["desirable"] = torch.tensor([row["desirable"] for row in rows])
            batch["image_ids"] = torch.tensor([number for row in rows for number in row["image_ids"]])
        if "reg_text" in rows[0]:
            batch["reg_texts"] = [row["reg_text"] for row in rows]
        return batch | candidate_positions(rows, self.candidate_texts)


@dataclass
class RowMetadataCollator:
    """A collator that passes row metadata around another collator, so that any collator of the user works.

    It adds to the batch `skipped`, a list of why each row was skipped ("" for a row that was not; padding is left
    out), and `stream_mark`, the position of the stream after the batch; each if rows have it.

    Args:
        collate: The trainer's collator.
    """

    collate: Callable[[list[Row]], dict[str, Any]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make the batch."""
        metadata: dict[str, Any] = {}
        if "skipped" in rows[0]:
            metadata["skipped"] = [row["skipped"] for row in rows if row["skipped"] is not None]
        if "stream_mark" in rows[-1]:
            metadata["stream_mark"] = rows[-1]["stream_mark"]
        kept = [{key: value for key, value in row.items() if key not in METADATA_KEYS} for row in rows]
        return {**self.collate(kept), **metadata}


def _images(row: Row, name: str) -> list[Image.Image]:
    """Return the images of a name in a row: of "image" all that it chooses among, if it is anchored at a text."""
    return row["images"] if name == "image" and "images" in row else [row[name]] if name in row else []


FEWEST_ROWS = 1e-8
"""Replaces a number of rows that is 0, so that a batch of padding alone has the gradient 0."""


def row_totals(*batches: Mapping[str, Any]) -> Tensor:
    """Return the number of preferences and of regularization images in batches, and the weight of the preferences.

    Args:
        *batches: At least one batch of the collator. Its `counted`, `reg_row_weight` and `weight` are read.

    Returns:
        Tensor[3], the sums of these three over all batches.
    """
    names = ("counted", "reg_row_weight", "weight")
    return torch.stack([torch.stack([batch[name].sum() for name in names]) for batch in batches]).sum(dim=0)
