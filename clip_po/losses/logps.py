"""What the losses read of a batch of preferences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLogps:
    """What the losses read of a batch of preferences: log-probabilities in nats, embeddings, and grades of the rows.

    `clip_po.losses.LOSSES` says which loss reads which of them.

    Attributes:
        chosen: Tensor[B], log pi(y_w | x). In a row of unpaired feedback, that of its only text.
        rejected: Tensor[B, R], log pi(y_l | x); -inf if a row has fewer than R rejected texts.
        ref_chosen: Tensor[B], log ref(y_w | x).
        ref_rejected: Tensor[B, R], log ref(y_l | x). Only read where `rejected` is finite.
        candidates: Tensor[B, N], log pi(y | x) over all candidate texts; -inf for an absent one.
        target: Tensor[B, N], log ref(y | x_clean) over the same texts, where x_clean is the image before the attack.
        embeds: Tensor[B, D], the policy's embedding of x, unit-norm.
        target_embeds: Tensor[B, D], the reference's embedding of x_clean, unit-norm.
        labelled: Tensor[B] of bool, whether the row has a chosen text. Only the losses in `LABEL_FREE` read the other
            rows. None if all rows have one.
        counted: Tensor[B] of bool, False for padding and for rows of weight 0, which must not enter a comparison
            between rows. None if all rows count.
        margin: Tensor[B], the margin that the row asks for, >= 0, in the unit of beta * log-ratio; None for 0.
        label_smoothing: Tensor[B], the row's own probability in [0, 0.5] that its preference is wrong; None for that
            of the settings.
        desirable: Tensor[B] of integers: 1 for a text that was called right, 0 for wrong, -1 for a row that is no
            unpaired feedback. None if no row is.
        mismatched_kl: Tensor[], the reference point of `kto`: the mean log-ratio of mismatched images and texts of the
            global batch, at least 0, in nats.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    candidates: Tensor | None = None
    target: Tensor | None = None
    embeds: Tensor | None = None
    target_embeds: Tensor | None = None
    labelled: Tensor | None = None
    counted: Tensor | None = None
    margin: Tensor | None = None
    label_smoothing: Tensor | None = None
    desirable: Tensor | None = None
    mismatched_kl: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """Log-ratios of the chosen texts, Tensor[B]: log pi(y_w | x) - log ref(y_w | x), in nats."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratios of the rejected texts, Tensor[B, R], in nats; -inf for an absent text."""
        absent = self.rejected.isneginf()
        return (self.rejected - self.ref_rejected).masked_fill(absent, -torch.inf)


def check_shapes(chosen: Tensor, rejected: Tensor) -> None:
    """Raise if values of chosen and rejected texts would broadcast to the differences between all rows.

    Args:
        chosen: Tensor[B].
        rejected: Tensor[B, R].

    Raises:
        ValueError: If the shapes are others.
    """
    if rejected.ndim != chosen.ndim + 1 or rejected.shape[:-1] != chosen.shape:
        raise ValueError(
            f"rejected must be Tensor[B, R] if chosen is Tensor[B], got {list(rejected.shape)} and "
            f"{list(chosen.shape)}. For one rejected text a row, pass rejected.unsqueeze(-1)."
        )


def single_rejected(chosen: Tensor, rejected: Tensor, loss_type: str) -> Tensor:
    """Return the values of the only rejected text of each row.

    Args:
        chosen: Tensor[B].
        rejected: Tensor[B, 1].
        loss_type: Name of the loss in messages.

    Returns:
        Tensor[B].

    Raises:
        ValueError: If there is more than one rejected text, or as for `check_shapes`.
    """
    check_shapes(chosen, rejected)
    if rejected.shape[-1] != 1:
        raise ValueError(
            f"loss_type={loss_type!r} compares the chosen text with one rejected text, got rows with up to "
            f"{rejected.shape[-1]}. Pass one rejected text a row, or use loss_type='sigmoid' (S-DPO)."
        )
    return rejected.squeeze(-1)
