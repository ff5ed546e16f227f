"""The texts over which the KL on ordinary images runs, and a warning if they are too few to preserve anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset, List
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.row_kinds import has_kinds
from clip_po.data.row_texts import own_texts
from clip_po.data.rows import PreferenceRows
from clip_po.data.typographic_preferences import AttackedClasses
from clip_po.data.vocabulary import open_vocabulary

logger = logging.get_logger(__name__)

ROWS_TO_LOOK_AT = 100


def regularization_texts(
    preferences: Any, candidate_texts: Sequence[str] | None, args: ContrastivePOConfig
) -> Sequence[str]:
    """Return the texts over which the regularization compares policy and reference beside the candidates.

    Args:
        preferences: `train_dataset` of the trainer, whose template is used if it has one.
        candidate_texts: The candidate texts of every row, or None.
        args: `reg_type` and `reg_candidate_texts`.

    Returns:
        The texts; none unless `reg_type` is "kl_open".
    """
    if not isinstance(args, ContrastivePOConfig) or args.reg_type != "kl_open":
        return ()
    if args.reg_candidate_texts is not None:
        return list(args.reg_candidate_texts)
    if isinstance(preferences, AttackedClasses):
        return open_vocabulary(preferences.template, preferences.class_names)
    return list(dict.fromkeys([*open_vocabulary("a photo of a {}"), *(candidate_texts or ())]))


def warn_of_few_texts(
    preferences: Any, candidate_texts: Sequence[str] | None, args: ContrastivePOConfig, name: str
) -> None:
    """Warn if the KL on ordinary images runs over the two texts of each row alone.

    Args:
        preferences: The checked preferences, numbered or streamed.
        candidate_texts: The candidate texts of every row, or None.
        args: The configuration.
        name: Name of the preferences in messages.
    """
    if args.reg_weight == 0 or args.reg_type != "kl" or candidate_texts is not None or args.in_batch_candidates:
        return
    most = _most_own_texts(preferences)
    if most is not None and most <= 2:
        logger.warning(
            f"The KL on ordinary images runs over the texts of each row of {name}, which are two. So it preserves how "
            "the model decides between these two texts only, and everything else may change. Pass candidate_texts, "
            "give the rows a column 'candidates' with more texts, or set in_batch_candidates=True."
        )


def _most_own_texts(preferences: Any) -> int | None:
    """Return the largest number of texts that a row chooses among, of the first rows; None if it is not known."""
    if isinstance(preferences, AttackedClasses):
        return 1 + preferences.most_rejected
    if isinstance(preferences, IterableDataset):
        features = preferences.features or {}
        several = isinstance(features.get("rejected"), List) or "candidates" in features
        return None if several or "chosen" not in features else 2
    if isinstance(preferences, Dataset) and has_kinds(preferences.column_names, preferences.features):
        return None
    if isinstance(preferences, Dataset):
        columns = [column for column in ("chosen", "rejected", "candidates") if column in preferences.column_names]
        head = preferences.select_columns(columns).with_format(None)
        texts = [own_texts(row) for row in head.select(range(min(ROWS_TO_LOOK_AT, len(head))))]
    elif isinstance(preferences, PreferenceRows):
        count = min(ROWS_TO_LOOK_AT, len(preferences))
        texts = [own_texts(preferences.texts(index, 0)) for index in range(count)]
    else:
        return None
    return max((len(own) for own in texts), default=None)
