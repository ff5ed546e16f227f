"""Preference losses: pure functions of log-probabilities, and the table of loss types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PreferenceLogps:
    """What the losses read of a batch of preferences: log-probabilities in nats, and image embeddings.

    Attributes:
        chosen: Tensor[B], log pi(y_w | x).
        rejected: Tensor[B, R], log pi(y_l | x); -inf if a row has fewer than R rejected texts.
        ref_chosen: Tensor[B], log ref(y_w | x).
        ref_rejected: Tensor[B, R], log ref(y_l | x). Only read where `rejected` is finite.
        candidates: Tensor[B, N], log pi(y | x) over all candidate texts; -inf for an absent one. Only `distillation`
            reads it.
        target: Tensor[B, N], log ref(y | x_clean) over the same texts, where x_clean is the image before the attack.
            Only `distillation` reads it.
        embeds: Tensor[B, D], the policy's embedding of x, unit-norm. Only `embedding_distillation` reads it.
        target_embeds: Tensor[B, D], the reference's embedding of x_clean, unit-norm. Only `embedding_distillation`
            reads it.
        labelled: Tensor[B] of bool, whether the row has a chosen text. Only the losses in `LABEL_FREE` read the other
            rows. None if all rows have one.
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

    @property
    def chosen_logratios(self) -> Tensor:
        """Log-ratios of the chosen texts, Tensor[B]: log pi(y_w | x) - log ref(y_w | x), in nats."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratios of the rejected texts, Tensor[B, R], in nats; -inf for an absent text."""
        absent = self.rejected.isneginf()
        return (self.rejected - self.ref_rejected).masked_fill(absent, -torch.inf)


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the DPO loss, or its softmax form S-DPO if there are several rejected texts.

    With m = -log sum_l exp(beta * (rejected_l - chosen)), which is beta times the margin for one rejected text, the
    loss is -(1 - label_smoothing) log sigmoid(m) - label_smoothing log sigmoid(-m).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, R], log pi_l - log ref_l; -inf for an absent text.
        beta: Strength of the pull to the reference, > 0.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong (conservative DPO).

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If the shapes do not match.

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; S-DPO: Chen et al. 2024, arXiv 2406.09215;
    label smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    _check_shapes(chosen_logratios, rejected_logratios)
    margin = -torch.logsumexp(beta * (rejected_logratios - chosen_logratios.unsqueeze(-1)), dim=-1)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Compute the IPO loss, the squared distance of the log-ratio margin to 1 / (2 beta).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        beta: Regularization strength, tau in the paper, > 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: Azar et al. 2023, arXiv 2310.12036, Eq. 17.
    """
    margin = chosen_logratios - _single(rejected_logratios, "ipo")
    return (margin - 1 / (2 * beta)) ** 2


def kto_pair_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the KTO loss of pairs: the chosen text is desirable, the rejected text undesirable.

    The loss is the mean over the two texts of desirable_weight * (1 - sigmoid(beta * (chosen - kl))) and
    undesirable_weight * (1 - sigmoid(beta * (kl - rejected))).

    Args:
        chosen_logratios: Tensor[B], log pi_w - log ref_w, in nats.
        rejected_logratios: Tensor[B, 1], log pi_l - log ref_l.
        kl: Tensor[], the reference point z0: KL(reference || policy) of the regularization batch, in nats. No gradient
            flows through it.
        beta: Steepness of the value function, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0.

    Returns:
        Tensor[B], one loss per preference.

    Raises:
        ValueError: If there is more than one rejected text.

    Source: the paired KTO of Afzali et al. 2025, arXiv 2411.08923; KTO: Ethayarajh et al. 2024,
    arXiv 2402.01306, Sec. 4.
    """
    kl = kl.detach()
    desirable = 1 - torch.sigmoid(beta * (chosen_logratios - kl))
    undesirable = 1 - torch.sigmoid(beta * (kl - _single(rejected_logratios, "kto_pair")))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


def sft_loss(chosen_logps: Tensor) -> Tensor:
    """Compute the cross-entropy on the chosen text: the baseline CE of the paper, under TRL's name.

    Args:
        chosen_logps: Tensor[B], log pi(y_w | x), in nats.

    Returns:
        Tensor[B], one loss per preference.
    """
    return -chosen_logps


def distillation_loss(target_logps: Tensor, policy_logps: Tensor) -> Tensor:
    """Compute KL(reference on the clean image || policy on the attacked image).

    The reference's answer on the clean image is the soft target, so no label is needed.

    Args:
        target_logps: Tensor[B, N], log ref(y | x_clean) in nats; -inf for an absent candidate.
        policy_logps: Tensor[B, N], log pi(y | x); -inf for the same candidates.

    Returns:
        Tensor[B], >= 0, one loss per image.

    Source: soft targets of Hinton et al. 2015, arXiv 1503.02531, at temperature 1. The model before alignment is its
    own teacher, on another view of the image.
    """
    return kl_regularization(target_logps, policy_logps)


def embedding_distillation_loss(target_embeds: Tensor, policy_embeds: Tensor) -> Tensor:
    """Compute 1 - cos(embedding under the reference on the clean image, embedding under the policy).

    The target is the reference's embedding of the clean image. It belongs to no task, so that what the model knows
    about any text is preserved: the answers to all texts depend on the embedding alone. No label is needed.

    Args:
        target_embeds: Tensor[B, D], unit-norm. No gradient flows through it.
        policy_embeds: Tensor[B, D], unit-norm: of the attacked image as a loss, of the clean image as a
            regularization.

    Returns:
        Tensor[B], 0 to 2, one loss per image.

    Source: the feature distillation of Romero et al. 2015 (FitNets), arXiv 1412.6550, on unit-norm embeddings, where
    1 - cos is half the squared distance. The model before alignment is its own teacher.
    """
    return 1 - (target_embeds.detach() * policy_embeds).sum(dim=-1)


def kl_regularization(ref_logps: Tensor, policy_logps: Tensor) -> Tensor:
    """Compute KL(reference || policy) over the candidate texts of each regularization image.

    Args:
        ref_logps: Tensor[B, N], log ref(y | x) in nats; -inf for an absent candidate.
        policy_logps: Tensor[B, N], log pi(y | x); -inf for the same candidates.

    Returns:
        Tensor[B], >= 0, one divergence per image. The caller takes the mean over the batch.

    Source: the regularization of Afzali et al. 2025, arXiv 2411.08923.
    """
    present = ~ref_logps.isneginf()
    ratios = ref_logps.masked_fill(~present, 0.0) - policy_logps.masked_fill(~present, 0.0)
    return (ref_logps.exp() * ratios).sum(dim=-1)


def _check_shapes(chosen: Tensor, rejected: Tensor) -> None:
    # Tensor[B] and Tensor[B] would broadcast to the differences between all rows.
    if rejected.ndim != chosen.ndim + 1 or rejected.shape[:-1] != chosen.shape:
        raise ValueError(
            f"rejected must be Tensor[B, R] if chosen is Tensor[B], got {list(rejected.shape)} and "
            f"{list(chosen.shape)}. For one rejected text a row, pass rejected.unsqueeze(-1)."
        )


def _single(rejected: Tensor, loss_type: str) -> Tensor:
    if rejected.shape[-1] != 1:
        raise ValueError(
            f"loss_type={loss_type!r} compares the chosen text with one rejected text, got rows with up to "
            f"{rejected.shape[-1]}. Pass one rejected text a row, or use loss_type='sigmoid' (S-DPO)."
        )
    return rejected.squeeze(-1)


@dataclass(frozen=True)
class LossSettings:
    """Hyperparameters of the losses, named as in `ContrastivePOConfig`.

    Attributes:
        beta: Strength of the pull to the reference, > 0; tau in `ipo`. `sft` and the losses in `LABEL_FREE` do not
            read it.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong. Only `sigmoid` reads it.
        desirable_weight: lambda_D, >= 0, the weight of chosen texts in `kto_pair`.
        undesirable_weight: lambda_U, >= 0, the weight of rejected texts in `kto_pair`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


Loss = Callable[[PreferenceLogps, Tensor | None, LossSettings], Tensor]


def _sigmoid(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    return sigmoid_loss(logps.chosen_logratios, logps.rejected_logratios, settings.beta, settings.label_smoothing)


def _ipo(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    return ipo_loss(logps.chosen_logratios, logps.rejected_logratios, settings.beta)


def _kto_pair(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    if kl is None:
        raise ValueError(
            "loss_type='kto_pair' needs the KL on regularization images as its reference point. Pass a reg_dataset, "
            "or rows with a column 'clean_image'."
        )
    return kto_pair_loss(
        logps.chosen_logratios,
        logps.rejected_logratios,
        kl,
        settings.beta,
        settings.desirable_weight,
        settings.undesirable_weight,
    )


def _sft(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    return sft_loss(logps.chosen)


def _distillation(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    if logps.target is None or logps.candidates is None:
        raise ValueError(
            "loss_type='distillation' needs the reference's answer on the clean image of each row. Add a column "
            "'clean_image'."
        )
    return distillation_loss(logps.target, logps.candidates)


def _embedding_distillation(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    if logps.embeds is None or logps.target_embeds is None:
        raise ValueError(
            "loss_type='embedding_distillation' needs the reference's embedding of the clean image of each row. Add a "
            "column 'clean_image'."
        )
    return embedding_distillation_loss(logps.target_embeds, logps.embeds)


LOSSES: Mapping[str, Loss] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "kto_pair": _kto_pair,
    "sft": _sft,
    "distillation": _distillation,
    "embedding_distillation": _embedding_distillation,
}
"""Loss by loss type: TRL's names, `kto_pair` for the paired KTO of the paper, and the two distillations."""

LABEL_FREE = frozenset({"distillation", "embedding_distillation"})
"""Loss types that read neither a chosen nor a rejected text, so that images without labels count too."""

WITHOUT_REJECTED = LABEL_FREE | {"sft"}
"""Loss types that read no rejected text."""

REFERENCED = frozenset({"sigmoid", "ipo", "kto_pair"})
"""Loss types that compare with the reference on the images of the preferences."""

TARGETED = LABEL_FREE
"""Loss types that compare with the reference on the clean image of the same row."""

SINGLE_REJECTED = frozenset({"ipo", "kto_pair"})
"""Loss types that take exactly one rejected text a row."""


def preference_loss(
    logps: PreferenceLogps,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    settings: LossSettings,
    kl: Tensor | None = None,
) -> Tensor:
    """Compute the weighted sum of losses.

    Args:
        logps: Log-probabilities of B preferences.
        loss_types: Names in `LOSSES`.
        loss_weights: One weight for each loss type.
        settings: beta and the other hyperparameters.
        kl: Tensor[], the reference point of `kto_pair`. Other losses do not read it.

    Returns:
        Tensor[B], one loss per preference. For a row that is not `labelled`, only the losses in `LABEL_FREE` count.

    Raises:
        ValueError: If a name is unknown, the number of weights is wrong, `kto_pair` gets no KL, or a loss that takes
            one rejected text gets several.
    """
    unknown = [name for name in loss_types if name not in LOSSES]
    if unknown or len(loss_types) != len(loss_weights):
        raise ValueError(
            f"loss_types must be names in {sorted(LOSSES)}, each with a weight, got {list(loss_types)} with the "
            f"weights {list(loss_weights)}."
        )
    losses = [
        weight * _of_labelled(LOSSES[name](logps, kl, settings), None if name in LABEL_FREE else logps.labelled)
        for name, weight in zip(loss_types, loss_weights, strict=True)
    ]
    return torch.stack(losses).sum(dim=0)


def _of_labelled(losses: Tensor, labelled: Tensor | None) -> Tensor:
    return losses if labelled is None else losses.where(labelled, 0.0)
