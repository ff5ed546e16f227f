"""Data that was given and that nothing reads: named once, when the trainer is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.column_names import meant
from clip_po.data.typographic_preferences import AttackedClasses
from clip_po.losses import ANCHORED

logger = logging.get_logger(__name__)


def warn_of_idle_data(
    preferences: Any, regularization: Dataset | None, candidate_texts: Sequence[str] | None, args: ContrastivePOConfig
) -> None:
    """Warn of each column, dataset or argument that has no effect next to the others.

    Args:
        preferences: `train_dataset` as it was given.
        regularization: `reg_dataset` as it was given.
        candidate_texts: The candidate texts of every row, or None.
        args: The configuration.
    """
    own = isinstance(preferences, (Dataset, IterableDataset))
    if own and "candidates" in (preferences.column_names or ()) and candidate_texts is not None:
        logger.warning(
            "The column 'candidates' of train_dataset has no effect, because candidate_texts sets the candidates of "
            "every row. Leave one of the two out."
        )
    read = args.reg_weight > 0 or args.reg_share > 0 or ANCHORED & set(args.loss_type)
    if regularization is not None and not read:
        logger.warning("reg_dataset has no effect, because reg_weight is 0. Set reg_weight, or leave reg_dataset out.")
    if args.embeddings_cache and args.precompute_ref_log_probs is False:
        logger.warning(
            "embeddings_cache has no effect, because precompute_ref_log_probs=False computes no embeddings before "
            "training. Leave one of the two out."
        )
    if regularization is not None and "weight" in regularization.column_names:
        logger.warning(
            "The column 'weight' of reg_dataset has no effect: only preferences have weights. Set reg_weight for all "
            "regularization images, or leave images out of reg_dataset."
        )
    if isinstance(preferences, AttackedClasses) and preferences.weight_column is None:
        for column in (column for column in preferences.image_columns if meant(column, ("weight",)) is not None):
            logger.warning(
                f"The column {column!r} of the images has no effect. Pass weight_column={column!r} to "
                f"{type(preferences).__name__}, or remove the column."
            )
