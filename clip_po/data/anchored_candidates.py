"""Among what rows of two images and of unpaired feedback choose, and what the KL on ordinary images runs over."""

from __future__ import annotations

from collections.abc import Collection

from datasets import Dataset
from transformers.utils import logging

from clip_po.candidates import CandidateTexts
from clip_po.config import ContrastivePOConfig
from clip_po.data.row_kinds import Kind

logger = logging.get_logger(__name__)


def fit_candidates(
    kinds: Collection[Kind],
    has_candidates: bool,
    regularization: Dataset | None,
    candidate_texts: CandidateTexts,
    args: ContrastivePOConfig,
    name: str,
) -> None:
    """Set `in_batch_candidates` if unpaired feedback needs it, and say which texts it chooses among.

    Args:
        kinds: The kinds of the rows.
        has_candidates: Whether rows of unpaired feedback have `candidates` of their own.
        regularization: Ordinary images, or None.
        candidate_texts: The candidate texts of every row, if any.
        args: The configuration. `in_batch_candidates` becomes True if a text has no other ones to be compared with.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If the KL on ordinary images would run over a single text.
    """
    if "unpaired" in kinds:
        logger.warning(f"{name}: unpaired feedback. {_choose_texts(has_candidates, candidate_texts, args)}")
    has_texts = candidate_texts or args.in_batch_candidates
    has_texts = has_texts or (regularization is not None and "text" in regularization.column_names)
    if "images" in kinds and args.reg_weight > 0 and args.reg_type == "kl" and not has_texts:
        raise ValueError(
            f"{name} has rows of one text, so that the KL on the images of reg_dataset, which runs over the texts of "
            "a row, preserves nothing. Add a column 'text' to reg_dataset, pass candidate_texts, set "
            "reg_type='embedding' or 'kl_open', or set reg_weight=0."
        )


def _choose_texts(has_candidates: bool, candidate_texts: CandidateTexts, args: ContrastivePOConfig) -> str:
    """Return which texts unpaired feedback chooses among, once `in_batch_candidates` is set where there are none."""
    if candidate_texts:
        return f"log pi(text | image) is over the {len(candidate_texts.texts or ()):,} candidate_texts."
    if args.in_batch_candidates:
        return "log pi(text | image) is over the texts of the global batch."
    if has_candidates:
        return "log pi(text | image) is over the candidates of each row."
    args.in_batch_candidates = True
    return (
        "log pi(text | image) is over the texts of the global batch (in_batch_candidates=True), because there are no "
        "other ones. Pass candidate_texts, or give the rows a column 'candidates', for others."
    )
