"""Checks of rows anchored at an image or at a text: columns, losses, texts and labels. Images are not read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from clip_po.candidates import CandidateTexts
from clip_po.data.formats import Row, check_row
from clip_po.data.grades import check_grades
from clip_po.data.row_kinds import Kind
from clip_po.data.row_texts import REMEDY, own_texts
from clip_po.data.stored_images import image_feature
from clip_po.losses import LABEL_FREE, LOSSES, UNPAIRED
from clip_po.validation import check_candidates, check_rejected_count, check_row_weight, check_text

_READING_TIES = {name for name, loss in LOSSES.items() if "label_smoothing" in loss.columns}

FILL_IN = "Fill it in or drop the row."


def check_image_columns(features: Mapping[str, Any], columns: Collection[str], name: str) -> None:
    """Raise if a column of images holds something else.

    Args:
        features: Features of the dataset.
        columns: The columns of images.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If one does; the message names it.
    """
    for column in columns:
        if image_feature(features[column]) is None:
            raise ValueError(
                f"{name} column {column!r} must hold images, bytes of image files, or lists of images, got "
                f"{features[column]}. Cast it: dataset.cast_column({column!r}, datasets.Image())."
            )


def check_losses(kinds: Collection[Kind], loss_types: Collection[str], name: str) -> None:
    """Raise if no loss reads a kind of rows, or a loss reads none of the rows.

    Args:
        kinds: The kinds of the rows.
        loss_types: Names of the losses.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If so; the message says which losses to use.
    """
    names, of_all = sorted(loss_types), sorted(LABEL_FREE.intersection(loss_types))
    of_unpaired = sorted(UNPAIRED.intersection(loss_types))
    of_pairs = sorted(set(loss_types) - UNPAIRED - LABEL_FREE)
    pairs, unpaired = not {"texts", "images"}.isdisjoint(kinds), "unpaired" in kinds
    if "images" in kinds and of_all:
        raise ValueError(
            f"loss_type={of_all} compares with each row's clean image, but {name} has rows of two images, which have "
            "none. Leave the loss out, or drop these rows."
        )
    if unpaired and not of_unpaired:
        raise ValueError(
            f"{name} has rows of unpaired feedback (image, text, label), which loss_type={names} does not read. Use "
            f"loss_type='kto' or 'apo_zero_unpaired'{', next to a loss of pairs' if pairs else ''}."
        )
    if pairs and not of_pairs and not of_all:
        raise ValueError(
            f"{name} has rows of a chosen and a rejected text or image, which loss_type={names} does not read. Use "
            f"loss_type='sigmoid' (DPO){', next to that loss' if unpaired else ''}; its counterpart of 'kto' is "
            "'kto_pair'."
        )
    idle = (of_unpaired if not unpaired else []) + (of_pairs if not pairs else [])
    if idle:
        held = "a chosen and a rejected text or image" if pairs else "unpaired feedback (image, text, label)"
        raise ValueError(f"loss_type={idle} reads no row of {name}: its rows are {held}. Leave the loss out.")


def check_ties(ties: int, columns: Collection[str], loss_types: Collection[str], name: str) -> None:
    """Raise if Pick-a-Pic's ties have no effect.

    Args:
        ties: Number of rows in which neither image is better.
        columns: Columns of the dataset.
        loss_types: Names of the losses.
        name: Name of the dataset in messages.

    Raises:
        ValueError: If there are ties, and a loss of pairs does not read `label_smoothing`.
    """
    blind = {loss for loss in loss_types if LOSSES[loss].rejected != "none"} - _READING_TIES
    if ties and blind and "label_0" in columns:
        raise ValueError(
            f"{name} has {ties:,} ties, which loss_type={sorted(blind)} can't read: they are preferences with "
            "label_smoothing=0.5. Use loss_type='sigmoid', or drop them: dataset.filter(lambda a, b: a != b, "
            "input_columns=['label_0', 'label_1'])."
        )


def check_anchored_row(
    row: Row, kind: Kind, images: int, candidate_texts: CandidateTexts, loss_types: Collection[str], where: str
) -> int:
    """Raise if the texts, label, weight or number of images of a row can't be used.

    Args:
        row: The values that it fills, without images.
        kind: Its kind.
        images: Number of its images, without a clean image.
        candidate_texts: The candidate texts of every row, if any.
        loss_types: Names of the losses.
        where: The row in messages, such as "train_dataset row 3".

    Returns:
        How many of its texts are cut, because they have more tokens than the model reads.

    Raises:
        ValueError: If they can't; the message names the column.
        TypeError: If an entry of `candidates` is not a string, or a grade is not a number.
    """
    if kind == "texts":
        check_row(row, candidate_texts.texts, loss_types, where)
        texts = own_texts(row) if "chosen" in row else []
    else:
        check_row_weight(row.get("weight", 1.0), f"{where}: column 'weight'")
        check_text(row.get("text"), f"{where}: column 'text'", FILL_IN)
        texts = [row["text"]]
        if kind == "images":
            check_grades(row, where)
            if images < 2:
                raise ValueError(f"{where}: column 'rejected_image' is empty. {FILL_IN}")
            check_rejected_count(images - 1, loss_types, f"{where}: column 'rejected_image'")
        else:
            texts = _unpaired_texts(row, where)
        _check_among(row, candidate_texts, where)
    if candidate_texts.tokens is None or candidate_texts:
        return 0
    cut = candidate_texts.tokens.learn(texts)
    candidate_texts.tokens.check_differ(texts, where, REMEDY)
    return cut


def _unpaired_texts(row: Row, where: str) -> list[str]:
    """Return the texts among which a row of unpaired feedback chooses, once its label and they are checked."""
    if not isinstance(row.get("label"), bool):
        raise ValueError(
            f"{where}: column 'label' must be True for a right text and False for a wrong one, got "
            f"{row.get('label')!r}. Cast it: dataset.cast_column('label', datasets.Value('bool'))."
        )
    own = row.get("candidates")
    check_candidates(own, f"{where}: column 'candidates'")
    return [row["text"]] if own is None else list(own)


def _check_among(row: Row, candidate_texts: CandidateTexts, where: str) -> None:
    known = candidate_texts.texts if candidate_texts.texts is not None else row.get("candidates")
    if known is not None and row["text"] not in known:
        source = "candidate_texts" if candidate_texts else "its candidates"
        raise ValueError(
            f"{where}: column 'text' is {row['text']!r}, which is not among {source}. Add it there, or leave the "
            "candidates out."
        )
