"""Preferences of every kind checked against the losses that will use them, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset

from clip_po.config import ContrastivePOConfig
from clip_po.data.formats import check_preferences, check_regularization
from clip_po.data.pairs import PreferencePairs
from clip_po.data.typographic import TypographicRows
from clip_po.losses import SINGLE_REJECTED, TARGETED


def checked_pairs(
    preferences: Any,
    regularization: Dataset | None,
    candidate_texts: Sequence[str] | None,
    args: ContrastivePOConfig,
    name: str,
    kind: type[PreferencePairs] = PreferencePairs,
) -> PreferencePairs:
    """Preference pairs whose rows were checked, all but their images.

    Args:
        preferences: As for `PreferencePairs`.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        candidate_texts: As for the trainer.
        args: Says which columns the losses need, and the seed.
        name: What messages call the preferences.
        kind: `EvaluationPairs` for evaluation.

    Raises:
        ValueError, TypeError: What was found, in which row and column, and what to do.
    """
    if isinstance(preferences, (IterableDataset, torch.utils.data.IterableDataset, TypographicRows)) and not hasattr(
        preferences, "row"
    ):
        raise TypeError(
            f"{name} is streamed, which only the train_dataset may be, as a datasets.IterableDataset or a "
            "TypographicStream: an evaluation counts every row once and in the same order. Load it without "
            "streaming=True, or keep a part: Dataset.from_list(list(stream.take(1000)), features=stream.features)."
        )
    if hasattr(preferences, "__len__") and len(preferences) == 0:
        raise ValueError(f"{name} is empty; give it at least one row.")
    if hasattr(preferences, "row"):
        check_drawn(preferences, candidate_texts, args, name)
    elif isinstance(preferences, Dataset):
        check_preferences(preferences, candidate_texts, args.loss_type, name)
    else:
        raise TypeError(
            f"{name} must be a datasets.Dataset or TypographicPreferences, got {type(preferences).__name__}. "
            "Dataset.from_list(rows) makes one of a list of dicts."
        )
    source, targets = image_sources(preferences.column_names, regularization, args, name)
    seed = args.data_seed if args.data_seed is not None else args.seed
    pairs = kind(preferences, source, candidate_texts, seed, name, targets, args.on_bad_image)
    if args.precompute_ref_log_probs and pairs.redrawn:
        raise ValueError(
            f"precompute_ref_log_probs=True, but the images of {name} are drawn anew each epoch. Set the attack's "
            "redraw='never' so that they stay the same, or leave precompute_ref_log_probs out: clean images are "
            "seen once all the same."
        )
    return pairs


def check_drawn(preferences: Any, candidate_texts: Sequence[str] | None, args: ContrastivePOConfig, name: str) -> None:
    """Refuse drawn preferences whose texts don't fit the losses or the candidate texts.

    Args:
        preferences: Says in `most_rejected` and `texts` what may be drawn.
        candidate_texts: As for the trainer.
        args: Names the losses.
        name: What messages call the preferences.

    Raises:
        ValueError: What may be drawn, and what to do.
    """
    single = SINGLE_REJECTED & set(args.loss_type)
    if single and preferences.most_rejected > 1:
        raise ValueError(
            f"{name} rejects up to {preferences.most_rejected} texts a row, but {sorted(single)} compare the "
            "chosen text with one. Set rejected='word' and the attack's count=(1, 1), or use 'sigmoid' (S-DPO)."
        )
    missing = [text for text in preferences.texts if text not in (candidate_texts or preferences.texts)]
    if missing:
        raise ValueError(
            f"{name} may draw the texts {missing[:3]} ({len(missing)} in all), which are not among the "
            "candidate_texts. Pass candidate_texts=dataset.candidate_texts and attack words that are class "
            "names, or leave candidate_texts out."
        )


def image_sources(
    columns: Collection[str], regularization: Dataset | None, args: ContrastivePOConfig, name: str
) -> tuple[Dataset | Literal["clean_image"] | None, Literal["clean_image"] | None]:
    """Where ordinary images and targets come from.

    Args:
        columns: Those of the preferences.
        regularization: As for `checked_pairs`.
        args: Says which of them the losses need.
        name: What messages call the preferences.

    Returns:
        `regularization` and `targets`, as for `PreferencePairs`.

    Raises:
        ValueError, TypeError: They are needed and not there, or can't be used.
    """
    source: Dataset | Literal["clean_image"] | None = None
    if args.reg_weight > 0 or "kto_pair" in args.loss_type:
        if regularization is None and "clean_image" not in columns:
            raise ValueError(
                f"reg_weight={args.reg_weight} and loss_type={args.loss_type} need ordinary images, but there is no "
                f"reg_dataset and {name} has no column 'clean_image'. Pass reg_dataset=..., or set reg_weight=0 "
                "(not for kto_pair, whose reference point is their KL)."
            )
        if regularization is not None:
            check_regularization(regularization)
        source = regularization if regularization is not None else "clean_image"
    targeted = sorted(TARGETED & set(args.loss_type))
    if targeted and "clean_image" not in columns:
        raise ValueError(
            f"loss_type={targeted} compares with the reference on each row's clean image, but {name} has no column "
            "'clean_image': add the images before the attack, or leave the loss out."
        )
    return source, "clean_image" if targeted else None
