"""The policy of a concept's transformation: embeddings of frozen towers, transformed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clip_po.policy import BatchLogps, batch_texts, candidate_logps
from clip_po.reference import ReferencePolicy


class ConceptPolicy:
    """pi(y | x) of a transformation of the reference's embeddings; no tower runs where a batch brings them along.

    Args:
        reference: The frozen model, which is the reference too.
    """

    def __init__(self, reference: ReferencePolicy) -> None:
        self.reference = reference

    def __call__(self, model: nn.Module, encoder: nn.Module, batch: Mapping[str, Any]) -> BatchLogps:
        """Log-probabilities over the candidate texts, as `Policy` gives them.

        Args:
            model: The `ConceptTransform` as wrapped for training.
            encoder: The CLIPModel, whose logit scale it keeps.
            batch: As `DataCollatorForContrastivePreference` makes it.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images where there are any.
        """
        images = list(self.reference.embeds_of(batch, ("image", "reg_image")).values())
        texts = self.reference.frozen_texts(batch_texts(self.reference.candidate_texts, batch))
        image_embeds, text_embeds = model(torch.cat(images), texts)
        logps = [
            candidate_logps(embeds, text_embeds, self.reference.logit_scale, batch.get("candidates"))
            for embeds in image_embeds.chunk(len(images))
        ]
        return BatchLogps(logps[0], logps[1] if len(logps) > 1 else None)
