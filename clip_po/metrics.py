"""Metrics of preferences, named as DPOTrainer names them, averaged over rows and not over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clip_po.losses import PreferenceLogps

RowMetrics = Mapping[str, tuple[Tensor, Tensor]]
"""By name: values Tensor[B] and the weights Tensor[B] of their mean."""


@torch.no_grad()
def preference_metrics(logps: PreferenceLogps, losses: Tensor, beta: float, weight: Tensor) -> RowMetrics:
    """Rewards, log-probabilities and loss of each preference.

    A reward is beta * (log pi - log ref). Of several rejected texts the mean is taken; a row is accurate where
    the chosen text's reward is above that of every rejected one.

    Args:
        logps: Log-probabilities of B preferences with R rejected texts, in nats.
        losses: Tensor[B], the preference losses.
        beta: As for the losses.
        weight: Tensor[B], weight of each row; 0 for padding.

    Returns:
        Values and weights by name: rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
        logps/chosen, logps/rejected, loss/preference. Rows without rejected texts count in theirs with weight 0.
    """
    present = ~logps.rejected.isneginf()
    paired = weight * present.any(dim=-1)
    chosen, rejected = beta * logps.chosen_logratios, beta * logps.rejected_logratios
    mean = _mean_of_present(rejected, present)
    return {
        "loss/preference": (losses.detach(), weight),
        "logps/chosen": (logps.chosen.detach(), weight),
        "logps/rejected": (_mean_of_present(logps.rejected, present), paired),
        "rewards/chosen": (chosen, weight),
        "rewards/rejected": (mean, paired),
        "rewards/margins": (chosen - mean, paired),
        "rewards/accuracies": ((chosen > rejected.amax(dim=-1)).float(), paired),
    }


def _mean_of_present(values: Tensor, present: Tensor) -> Tensor:
    return values.masked_fill(~present, 0.0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


class RunningMeans:
    """Weighted means over rows, summed on the device and brought together over processes only when asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: RowMetrics) -> None:
        """Add the rows of a batch."""
        for name, (values, weight) in rows.items():
            # float64 where the device has it: a float32 sum over many rows would lose the last digits.
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            pair = torch.stack([(values.to(dtype) * weight.to(dtype)).sum(), weight.to(dtype).sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, over all processes; forgets them.

        Args:
            reduce: Sums a tensor over processes, such as `accelerator.reduce`. Every process must call `pop`
                after the same batches.

        Returns:
            The mean by name; names whose rows all have the weight 0 are left out.
        """
        names, sums = sorted(self._sums), self._sums
        self._sums = {}
        if not names:
            return {}
        total = reduce(torch.stack([sums[name] for name in names])).tolist()
        return {name: value / weight for name, (value, weight) in zip(names, total, strict=True) if weight > 0}
