"""Metrics of preferences under the names of TRL's DPOTrainer, averaged over rows rather than over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clip_po.losses import PreferenceLogps

SMALLEST_MARGIN = 1e-4
"""Margin of log-ratios in nats above which a preference counts as won. Rounding alone makes smaller ones."""

RowMetrics = Mapping[str, tuple[Tensor, Tensor]]
"""Values Tensor[B] and their row weights Tensor[B], by metric name."""


@torch.no_grad()
def preference_metrics(logps: PreferenceLogps, beta: float, weight: Tensor) -> RowMetrics:
    """Compute the rewards and log-probabilities of each preference.

    A reward is beta * (log pi - log ref). Several rejected texts count with their mean. A row is accurate if the
    log-ratio of the chosen text is above that of every rejected text by more than `SMALLEST_MARGIN`: a tie is no win.

    Args:
        logps: Log-probabilities of B preferences with R rejected texts, in nats.
        beta: Strength of the pull to the reference, as in the losses.
        weight: Tensor[B], weight of each row; 0 for padding.

    Returns:
        Values and weights by name: rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
        logps/chosen, logps/rejected. Rows without rejected texts have weight 0 in the metrics about rejected texts,
        and rows without a label have weight 0 in all of them. Right texts of unpaired feedback count as chosen, wrong
        ones as rejected, and `mismatched_kl` is the reference point of `kto`.
    """
    given = weight
    weight = weight if logps.labelled is None else weight * logps.labelled
    present = ~logps.rejected.isneginf()
    paired = weight * present.any(dim=-1)
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    mean = _mean_of_present(rejected, present)
    margins = logps.chosen_logratios - logps.rejected_logratios.amax(dim=-1)
    metrics = {
        "logps/chosen": (logps.chosen.detach(), weight),
        "logps/rejected": (_mean_of_present(logps.rejected, present), paired),
        "rewards/chosen": (chosen, weight),
        "rewards/rejected": (mean, paired),
        "rewards/margins": (chosen - mean, paired),
        "rewards/accuracies": ((margins > SMALLEST_MARGIN).float(), paired),
    }
    return (
        metrics
        if logps.desirable is None
        else {**metrics, **_unpaired_metrics(logps, logps.desirable, beta, given, metrics)}
    )


def _unpaired_metrics(
    logps: PreferenceLogps, desirable: Tensor, beta: float, given: Tensor, metrics: RowMetrics
) -> RowMetrics:
    """Add unpaired feedback to the metrics of one text: a right text counts as chosen, a wrong one as rejected."""
    found = {}
    for side, label in (("chosen", 1), ("rejected", 0)):
        rows = torch.eq(desirable, label)
        for name, value in ((f"logps/{side}", logps.chosen), (f"rewards/{side}", beta * logps.chosen_logratios)):
            others, weight = metrics[name]
            found[name] = (value.detach().where(rows, others), given.where(rows, weight))
    if logps.mismatched_kl is not None:
        found["mismatched_kl"] = (logps.mismatched_kl.expand(len(given)), torch.ones_like(given))
    return found


def _mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    return values.masked_fill(~present, 0.0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


def loss_of_parts(means: Mapping[str, float]) -> float:
    """Return the loss, the sum of its parts.

    Args:
        means: Means by name. The parts of the loss are called `loss/...`, such as loss/preference.

    Returns:
        The sum; 0 if there are no parts.
    """
    return sum(mean for name, mean in means.items() if name.startswith("loss/"))


class RunningMeans:
    """Weighted means over rows, summed on the device and reduced over processes only when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: RowMetrics) -> None:
        """Add the rows of a batch.

        Args:
            rows: Values and row weights by name, as from `preference_metrics`. A value that is not finite spoils the
                mean even if its weight is 0.
        """
        for name, (values, weight) in rows.items():
            # float64 where the device has it: a float32 sum over many rows loses the last digits.
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            pair = torch.stack([(values.to(dtype) * weight.to(dtype)).sum(), weight.to(dtype).sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def loss_is_finite(self, device: torch.device) -> Tensor:
        """Return whether every part of the loss since the last `pop` is finite, in this process.

        Args:
            device: Device of the answer if no loss was added since then. Otherwise the answer is where the losses are.

        Returns:
            Tensor[] of bool, so that the caller decides when to wait for the device. True if no loss was added.
        """
        sums = [pair[0] for name, pair in self._sums.items() if name.startswith("loss/")]
        return torch.stack(sums).isfinite().all() if sums else torch.tensor(True, device=device)

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means since the last call over all processes, and forget them.

        Args:
            reduce: Sums a tensor over processes, such as `accelerator.reduce`. Every process must call `pop` after the
                same batches.

        Returns:
            The mean by name. Names whose rows all have weight 0 are left out.
        """
        names, sums = sorted(self._sums), self._sums
        self._sums = {}
        if not names:
            return {}
        total = reduce(torch.stack([sums[name] for name in names])).tolist()
        return {name: value / weight for name, (value, weight) in zip(names, total, strict=True) if weight > 0}
