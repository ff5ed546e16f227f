"""The table of loss types: each loss with what it reads. Checks of arguments, columns and rows are derived from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_po.losses.distillation import distillation_loss, embedding_distillation_loss, sft_loss
from clip_po.losses.divergences import f_divergence_scores
from clip_po.losses.global_batch import of_all_processes, of_this_process
from clip_po.losses.logps import PreferenceLogps, single_rejected
from clip_po.losses.pairwise import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from clip_po.losses.pointwise import (
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_pair_loss,
    kto_loss,
    kto_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from clip_po.losses.transport import aot_loss


@dataclass(frozen=True)
class LossSettings:
    """Hyperparameters of the losses, named as in `ContrastivePOConfig`. `LOSSES` says which loss reads which.

    Attributes:
        beta: Strength of the pull to the reference, > 0; tau in `ipo`.
        label_smoothing: Probability in [0, 0.5) that a preference is wrong.
        desirable_weight: lambda_D, >= 0, the weight of chosen texts in `kto_pair`, of right texts in `kto`.
        undesirable_weight: lambda_U, >= 0, the weight of rejected texts in `kto_pair`, of wrong texts in `kto`.
        f_divergence_type: A name in `F_DIVERGENCES`.
        f_alpha_divergence_coef: alpha of "alpha_divergence".
        discopop_tau: Width of the blend in `discopop`, in (0, 1].
        simpo_gamma: Margin of `simpo`, >= 0.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5


@dataclass(frozen=True)
class Loss:
    """A loss, and what it reads.

    Attributes:
        compute: The loss of log-probabilities, of the reference point of `kto_pair` (Tensor[] or None) and of the
            settings: Tensor[B], one loss per row.
        settings: Names of the `LossSettings` that it reads.
        rows: The rows that it reads: those with a chosen text, unpaired feedback, or all.
        rejected: How many rejected texts a row may have.
        compared: The image on which it compares with the reference: that of the row, the clean image of the row, or
            none.
        columns: Optional columns of a row that it reads.
        anchored: Whether it reads the reference point, the KL on ordinary images.
    """

    compute: Callable[[PreferenceLogps, Tensor | None, LossSettings], Tensor]
    settings: frozenset[str] = frozenset({"beta"})
    rows: Literal["preferences", "unpaired", "all"] = "preferences"
    rejected: Literal["none", "one", "several"] = "one"
    compared: Literal["image", "clean_image"] | None = "image"
    columns: frozenset[str] = frozenset()
    anchored: bool = False


# ---- From log-probabilities to the arguments of a loss -----------------------------------------------------


def _scores(logps: PreferenceLogps, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Return the log-ratios of chosen [B] and rejected [B, R] texts, as scores of the f-divergence."""
    chosen, rejected = (
        f_divergence_scores(ratios, settings.f_divergence_type, settings.f_alpha_divergence_coef)
        for ratios in (logps.chosen_logratios, logps.rejected_logratios)
    )
    return chosen, rejected


def _grades(logps: PreferenceLogps, settings: LossSettings) -> tuple[Tensor | float, Tensor | float]:
    """Return label smoothing and margin of the rows: their own, or else those of all."""
    smoothing = settings.label_smoothing if logps.label_smoothing is None else logps.label_smoothing
    return smoothing, 0.0 if logps.margin is None else logps.margin


def _kto_pair(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    if kl is None:
        raise ValueError(
            "loss_type='kto_pair' needs the KL on regularization images as its reference point. Pass a reg_dataset, "
            "or rows with a column 'clean_image'."
        )
    ratios, weights = (logps.chosen_logratios, logps.rejected_logratios), _weights(settings)
    return kto_pair_loss(*ratios, kl, settings.beta, *weights)


def _weights(settings: LossSettings) -> tuple[float, float]:
    return settings.desirable_weight, settings.undesirable_weight


def _aot(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    policy = logps.chosen - single_rejected(logps.chosen, logps.rejected, "aot")
    reference = logps.ref_chosen - single_rejected(logps.ref_chosen, logps.ref_rejected, "aot")
    return _sorted_over_batch(policy, reference, logps, settings)


def _aot_unpaired(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    chosen = logps.chosen_logratios
    rejected = single_rejected(chosen, logps.rejected_logratios, "aot_unpaired")
    return _sorted_over_batch(chosen, rejected, logps, settings)


def _sorted_over_batch(upper: Tensor, lower: Tensor, logps: PreferenceLogps, settings: LossSettings) -> Tensor:
    """Return the loss of the rows of this process, sorted among those of all processes that count."""
    counted = torch.ones_like(upper)
    for mask in (logps.counted, logps.labelled):
        counted = counted if mask is None else counted * mask
    upper, lower, counted = of_all_processes(torch.stack([upper, lower, counted], dim=-1)).unbind(dim=-1)
    return of_this_process(aot_loss(upper, lower, settings.beta, settings.label_smoothing, counted > 0))


def _kto(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    desirable, kl = _desirable(logps, "kto"), logps.mismatched_kl
    if kl is None:
        raise ValueError("loss_type='kto' needs the log-ratio of mismatched images and texts as its reference point.")
    return kto_loss(logps.chosen_logratios, desirable, kl, settings.beta, *_weights(settings))


def _apo_zero_unpaired(logps: PreferenceLogps, kl: Tensor | None, settings: LossSettings) -> Tensor:
    desirable = _desirable(logps, "apo_zero_unpaired")
    return apo_zero_unpaired_loss(logps.chosen_logratios, desirable, settings.beta, *_weights(settings))


def _desirable(logps: PreferenceLogps, loss_type: str) -> Tensor:
    if logps.desirable is None:
        raise ValueError(
            f"loss_type={loss_type!r} reads unpaired feedback: rows with an image, one text and a label, True for a "
            "right text. For rows with a chosen and a rejected text, use 'kto_pair' or 'apo_zero'."
        )
    return logps.desirable > 0


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


# ---- The table ---------------------------------------------------------------------------------------------

_DIVERGENCE = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})
_BETA = frozenset({"beta"})
_SMOOTHED = frozenset({"beta", "label_smoothing"})
_WEIGHTED = frozenset({"beta", "desirable_weight", "undesirable_weight"})
_GRADES = frozenset({"margin", "label_smoothing"})

_DPO = Loss(
    lambda x, kl, s: sigmoid_loss(*_scores(x, s), s.beta, *_grades(x, s)),
    settings=_SMOOTHED | _DIVERGENCE,
    rejected="several",
    columns=_GRADES,
)

LOSSES: Mapping[str, Loss] = {
    "sigmoid": _DPO,
    "sigmoid_norm": _DPO,  # it divides by the number of tokens, but a text is one action of this policy
    "hinge": Loss(lambda x, kl, s: hinge_loss(*_scores(x, s), s.beta), settings=_BETA | _DIVERGENCE),
    "ipo": Loss(lambda x, kl, s: ipo_loss(*_scores(x, s), s.beta), settings=_BETA | _DIVERGENCE),
    "exo_pair": Loss(
        lambda x, kl, s: exo_pair_loss(*_scores(x, s), s.beta, s.label_smoothing), settings=_SMOOTHED | _DIVERGENCE
    ),
    "robust": Loss(
        lambda x, kl, s: robust_loss(*_scores(x, s), s.beta, s.label_smoothing), settings=_SMOOTHED | _DIVERGENCE
    ),
    "discopop": Loss(
        lambda x, kl, s: discopop_loss(*_scores(x, s), s.beta, s.discopop_tau),
        settings=_BETA | _DIVERGENCE | {"discopop_tau"},
    ),
    "nca_pair": Loss(lambda x, kl, s: nca_pair_loss(x.chosen_logratios, x.rejected_logratios, s.beta)),
    "bco_pair": Loss(lambda x, kl, s: bco_pair_loss(x.chosen_logratios, x.rejected_logratios, s.beta)),
    "sppo_hard": Loss(lambda x, kl, s: sppo_hard_loss(x.chosen_logratios, x.rejected_logratios, s.beta)),
    "apo_zero": Loss(lambda x, kl, s: apo_zero_loss(x.chosen_logratios, x.rejected_logratios, s.beta)),
    "apo_down": Loss(lambda x, kl, s: apo_down_loss(x.chosen_logratios, x.rejected_logratios, s.beta)),
    "aot": Loss(_aot, settings=_SMOOTHED),
    "aot_unpaired": Loss(_aot_unpaired, settings=_SMOOTHED),
    "kto_pair": Loss(_kto_pair, settings=_WEIGHTED, anchored=True),
    "kto": Loss(_kto, settings=_WEIGHTED, rows="unpaired", rejected="none"),
    "apo_zero_unpaired": Loss(_apo_zero_unpaired, settings=_WEIGHTED, rows="unpaired", rejected="none"),
    "simpo": Loss(
        lambda x, kl, s: simpo_loss(x.chosen, x.rejected, s.beta, s.simpo_gamma, *_grades(x, s)),
        settings=_SMOOTHED | {"simpo_gamma"},
        compared=None,
        columns=_GRADES,
    ),
    "sft": Loss(lambda x, kl, s: sft_loss(x.chosen), settings=frozenset(), rejected="none", compared=None),
    "distillation": Loss(_distillation, settings=frozenset(), rows="all", rejected="none", compared="clean_image"),
    "embedding_distillation": Loss(
        _embedding_distillation, settings=frozenset(), rows="all", rejected="none", compared="clean_image"
    ),
}
"""Loss by loss type: the names of TRL's DPOTrainer and KTOTrainer, `simpo` of its CPOTrainer, `kto_pair` for the
paired KTO of the paper, and the two distillations."""


def _names(read: Callable[[Loss], bool]) -> frozenset[str]:
    return frozenset(name for name, loss in LOSSES.items() if read(loss))


LABEL_FREE = _names(lambda loss: loss.rows == "all")
"""Loss types that read neither a chosen nor a rejected text, so that images without labels count too."""

UNPAIRED = _names(lambda loss: loss.rows == "unpaired")
"""Loss types that read unpaired feedback: rows with one text and whether it is right."""

WITHOUT_REJECTED = _names(lambda loss: loss.rejected == "none")
"""Loss types that read no rejected text."""

SINGLE_REJECTED = _names(lambda loss: loss.rejected == "one")
"""Loss types that take exactly one rejected text a row."""

REFERENCED = _names(lambda loss: loss.compared == "image")
"""Loss types that compare with the reference on the images of the preferences."""

TARGETED = _names(lambda loss: loss.compared == "clean_image")
"""Loss types that compare with the reference on the clean image of the same row."""

ANCHORED = _names(lambda loss: loss.anchored)
"""Loss types that need the KL on ordinary images as their reference point."""


def readers(name: str) -> frozenset[str]:
    """Return the loss types that read a setting or an optional column.

    Args:
        name: Name of an attribute of `LossSettings`, or of a column: "margin".

    Returns:
        Names in `LOSSES`.
    """
    return _names(lambda loss: name in loss.settings | loss.columns)


def preference_loss(
    logps: PreferenceLogps,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    settings: LossSettings,
    kl: Tensor | None = None,
) -> Tensor:
    """Compute the weighted sum of losses.

    Args:
        logps: Log-probabilities of B preferences. With `aot` or `aot_unpaired`, every process must call the function
            with the same number of rows.
        loss_types: Names in `LOSSES`.
        loss_weights: One weight for each loss type.
        settings: beta and the other hyperparameters.
        kl: Tensor[], the reference point of `kto_pair`. Other losses do not read it.

    Returns:
        Tensor[B], one loss per preference. A row that a loss does not read counts 0: in most losses a row that is not
        `labelled`, in those of unpaired feedback every other row.

    Raises:
        ValueError: If a name is unknown, the number of weights is wrong, something that a loss reads is missing, or a
            loss that takes one rejected text gets several.
    """
    unknown = [name for name in loss_types if name not in LOSSES]
    if unknown or len(loss_types) != len(loss_weights):
        raise ValueError(
            f"loss_types must be names in {sorted(LOSSES)}, each with a weight, got {list(loss_types)} with the "
            f"weights {list(loss_weights)}."
        )
    read = {
        "all": None,
        "preferences": logps.labelled,
        "unpaired": None if logps.desirable is None else logps.desirable >= 0,
    }
    losses = [
        weight * _of_rows(LOSSES[name].compute(logps, kl, settings), read[LOSSES[name].rows])
        for name, weight in zip(loss_types, loss_weights, strict=True)
    ]
    return torch.stack(losses).sum(dim=0)


def _of_rows(losses: Tensor, read: Tensor | None) -> Tensor:
    return losses if read is None else losses.where(read, 0.0)
