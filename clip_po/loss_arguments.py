"""The arguments of the losses and of a moving reference: a part of `ContrastivePOConfig`, with their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from clip_po.families import PolicyKind
from clip_po.losses import F_DIVERGENCES, LOSSES, REFERENCED, LossSettings, readers
from clip_po.validation import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, Allowed, check_number

SMOOTHING = Allowed("lie in [0, 0.5)", lambda number: 0 <= number < 0.5)
POSITIVE_SHARE = Allowed("lie in (0, 1]", lambda number: 0 < number <= 1)

LOSS_NUMBERS: Mapping[str, Allowed] = {
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    "f_alpha_divergence_coef": FINITE,
    "discopop_tau": POSITIVE_SHARE,
    "simpo_gamma": NOT_NEGATIVE,
    "ref_model_mixup_alpha": POSITIVE_SHARE,
    "ref_model_sync_steps": COUNT,
}
"""Values that numeric arguments may have, beside `beta` and `label_smoothing`."""

READ_BY: Mapping[str, frozenset[str]] = {
    **{setting.name: readers(setting.name) for setting in dataclasses.fields(LossSettings) if setting.name != "beta"},
    "reference_free": REFERENCED,
}
"""Arguments that only some losses read, with these losses. beta has a place in most of them."""


@dataclass
class LossArguments:
    """Arguments of the losses and of a moving reference.

    Args:
        > The losses

        policy (`str`, defaults to `"softmax"`): How logits become probabilities. `"softmax"`: the candidates of a row
            share one probability. `"sigmoid"`: each candidate is right or wrong by itself, with log pi = log
            sigmoid(logit); the KL is the sum of the KLs of the candidates. Only for models trained by a sigmoid of
            each pair, such as SigLIP; refused for others.
        loss_type (`list[str]`, defaults to `["sigmoid"]`): `"sigmoid"` (DPO, and S-DPO with several rejected
            texts), `"sft"` (cross-entropy on the chosen text), `"kto_pair"` (the paper's KTO), `"distillation"` (the
            reference's answer on the clean image as a soft target, without labels), `"embedding_distillation"` (1 -
            cosine to the reference's embedding of the clean image, without labels), and under TRL's names `"ipo"`,
            `"hinge"`, `"robust"`, `"exo_pair"`, `"nca_pair"`, `"bco_pair"`, `"sppo_hard"`, `"aot"`,
            `"aot_unpaired"`, `"apo_zero"`, `"apo_down"`, `"discopop"`, `"sigmoid_norm"` (the same as `"sigmoid"`),
            `"simpo"`, and for unpaired feedback `"kto"` and `"apo_zero_unpaired"`. Several losses are summed.
        loss_weights (`list[float]`, *optional*): Weight of each loss type. Defaults to 1 each.
        beta (`float`, defaults to `0.1`): Strength of the pull to the reference policy, > 0. It is tau in IPO.
        label_smoothing (`float`, defaults to `0.0`): Probability in [0, 0.5) that a preference is wrong. `sigmoid`,
            `robust`, `exo_pair` (which needs it above 0), `aot`, `aot_unpaired` and `simpo` read it. Another value
            than the default is refused without one of them. A column `label_smoothing` sets it for each row.
        reference_free (`bool`, defaults to `False`): Use 0 for the reference's log-ratios of the preferences. The
            regularization still compares with the reference. Refused if no loss compares with the reference.
        desirable_weight (`float`, defaults to `1.0`): Weight of chosen texts in `kto_pair`, and of texts that were
            called right in `kto` and `apo_zero_unpaired`, >= 0. Refused without one of these.
        undesirable_weight (`float`, defaults to `1.0`): Weight of rejected texts in `kto_pair`, and of texts that were
            called wrong in `kto` and `apo_zero_unpaired`, >= 0. Refused without one of these.
        f_divergence_type (`str`, defaults to `"reverse_kl"`): The divergence by which DPO's reward holds the policy to
            the reference: `"reverse_kl"`, `"forward_kl"`, `"js_divergence"` or `"alpha_divergence"`. `sigmoid`,
            `hinge`, `ipo`, `exo_pair`, `robust` and `discopop` read it. Refused next to a loss that compares with the
            reference without reading it.
        f_alpha_divergence_coef (`float`, defaults to `0.5`): alpha of `"alpha_divergence"`. Refused without it.
        discopop_tau (`float`, defaults to `0.05`): Width in (0, 1] of the blend in `discopop`. Refused without it.
        simpo_gamma (`float`, defaults to `0.5`): Margin of every preference in `simpo`, >= 0, after beta. Refused
            without it.

        > A reference that follows the policy

        sync_ref_model (`bool`, defaults to `False`): Move the reference towards the policy during training (TR-DPO).
            The regularization and the distillations then compare with the moved reference too. Images are not embedded
            before training, unless the vision tower is frozen. Refused with adapters, FSDP and DeepSpeed.
        ref_model_mixup_alpha (`float`, defaults to `0.6`): Share in (0, 1] of the policy in the moved reference: each
            weight becomes alpha * policy + (1 - alpha) * reference. Refused without `sync_ref_model`.
        ref_model_sync_steps (`int`, defaults to `512`): Number of optimizer steps between two moves. Refused without
            `sync_ref_model`.
    """

    policy: PolicyKind = field(
        default="softmax",
        metadata={"help": "softmax over the candidates, or sigmoid of each candidate (SigLIP and SigLIP 2 only)."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Losses to sum: sigmoid (DPO, S-DPO), sft (cross-entropy), kto_pair, distillation, "
            "embedding_distillation, simpo; TRL's ipo, hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, "
            "aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm; for unpaired feedback kto, apo_zero_unpaired."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss type; default: 1 each."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull to the reference policy, > 0; tau in IPO."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability in [0, 0.5) that a preference is wrong (sigmoid, robust, exo_pair, aot, "
            "aot_unpaired, simpo)."
        },
    )
    reference_free: bool = field(
        default=False, metadata={"help": "Use 0 for the reference's log-ratios of the preferences."}
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of chosen texts in kto_pair, of right texts in kto."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of rejected texts in kto_pair, of wrong texts in kto."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence from the reference in sigmoid, hinge, ipo, exo_pair, robust and discopop: reverse_kl, "
            "forward_kl, js_divergence, alpha_divergence."
        },
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "alpha of alpha_divergence."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Width of the blend in discopop, in (0, 1]."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of every preference in simpo, >= 0."})

    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy during training (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the moved reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Number of optimizer steps between two moves of the reference."}
    )

    @property
    def weights(self) -> list[float]:
        """The weight of each loss type."""
        return self.loss_weights if self.loss_weights is not None else [1.0] * len(self.loss_type)

    @property
    def loss_settings(self) -> LossSettings:
        """The hyperparameters of the losses."""
        return LossSettings(
            **{setting.name: getattr(self, setting.name) for setting in dataclasses.fields(LossSettings)}
        )

    def _check_losses(self) -> None:
        """Raise if loss types, their weights and their hyperparameters can't be used or do not fit together."""
        if not isinstance(self.loss_type, (list, tuple)):
            raise TypeError(
                f"loss_type must be the name of a loss or a list of names, got {self.loss_type!r} "
                f"({type(self.loss_type).__name__}). Choose from {sorted(LOSSES)}."
            )
        unknown = [name for name in self.loss_type if name not in LOSSES]
        if unknown or not self.loss_type:
            raise ValueError(
                f"loss_type must name one or more of {sorted(LOSSES)}, got {self.loss_type!r}. "
                "DPO is 'sigmoid', KTO on pairs 'kto_pair', cross-entropy 'sft'."
            )
        if self.policy not in get_args(PolicyKind):
            raise ValueError(f"policy must be one of {list(get_args(PolicyKind))}, got {self.policy!r}.")
        if self.policy == "sigmoid" and "distillation" in self.loss_type:
            raise ValueError(
                "loss_type='distillation' compares probabilities that sum to 1 over the candidates, which those of "
                "policy='sigmoid' do not. Use policy='softmax', or loss_type='embedding_distillation'."
            )
        self._check_weights()
        check_number(
            "beta",
            self.beta,
            POSITIVE,
            "To train without a pull to the reference, use loss_type='sft' or reference_free=True.",
        )
        check_number("label_smoothing", self.label_smoothing, SMOOTHING)
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError(
                "loss_type='exo_pair' is infinite with label_smoothing=0. Set label_smoothing=1e-3, as its paper "
                "recommends."
            )
        self._check_divergence()

    def _check_weights(self) -> None:
        weights = self.loss_weights
        if weights is not None and not (isinstance(weights, (list, tuple)) and len(weights) == len(self.loss_type)):
            raise ValueError(
                f"loss_weights must hold one weight for each of the {len(self.loss_type)} loss types "
                f"{self.loss_type!r}, got {self.loss_weights!r}."
            )
        for position, weight in enumerate(weights or ()):
            check_number(f"loss_weights[{position}]", weight, NOT_NEGATIVE)
        if weights is not None and not any(weights):
            raise ValueError(
                f"loss_weights={weights!r} leaves only the regularization, which asks for no change: nothing would be "
                "trained. Give a loss a weight above 0."
            )

    def _check_divergence(self) -> None:
        name = self.f_divergence_type
        if name not in F_DIVERGENCES:
            raise ValueError(f"f_divergence_type must be one of {list(F_DIVERGENCES)}, got {name!r}.")
        unsuited = sorted(REFERENCED.intersection(self.loss_type) - readers("f_divergence_type"))
        if unsuited and name != "reverse_kl":
            raise ValueError(
                f"f_divergence_type={name!r} changes only losses of the difference between two texts, but {unsuited} "
                f"do not read it. Leave it out, or use losses of {sorted(readers('f_divergence_type'))}."
            )
        if self.f_alpha_divergence_coef != type(self).f_alpha_divergence_coef and name != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef!r} has no effect with f_divergence_type="
                f"{name!r}. Set f_divergence_type='alpha_divergence', or leave it out."
            )

    def _check_read_by_a_loss(self) -> None:
        """Raise if an argument was set that none of the losses reads."""
        for name, losses in READ_BY.items():
            value = getattr(self, name)
            if value != getattr(type(self), name) and not losses & set(self.loss_type):
                raise ValueError(
                    f"{name}={value!r} has no effect with loss_type={self.loss_type!r}: only {sorted(losses)} reads "
                    f"it. Leave {name} out, or add such a loss."
                )
