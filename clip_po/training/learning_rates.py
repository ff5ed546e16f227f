"""Learning rates by tower and by depth, as groups of parameters of the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.config import ContrastivePOConfig
from clip_po.families import Tower
from clip_po.trainable import tower_of

_BLOCK = re.compile(r"\.(?:layers?|blocks)\.(\d+)\.")
_BELOW_THE_BLOCKS = re.compile(r"\.(?:\w*embeddings?|pre_layrnorm)(?:\.|$)")


def initial_rates(names: Iterable[str], args: ContrastivePOConfig) -> dict[str, float]:
    """Return the initial learning rate of each parameter.

    Args:
        names: Names of all parameters of a dual encoder, frozen ones too: they tell the number of blocks of a tower.
        args: `learning_rate`, `vision_learning_rate`, `text_learning_rate` and `layer_decay`.

    Returns:
        The rate by name: that of the tower, times `layer_decay` for each block from the top of the tower down to the
        parameter. What is in no tower, such as the logit scale, has `learning_rate`.

    Source: Layer-wise decay: Clark et al. 2020, arXiv 2003.10555; Bao et al. 2022, arXiv 2106.08254.
    """
    names = list(names)
    blocks = {tower: max((_block(n) or 0 for n in names if tower_of(n) == tower), default=0) + 1 for tower in _TOWERS}
    given = {"vision": args.vision_learning_rate, "text": args.text_learning_rate}

    def rate(name: str) -> float:
        tower = tower_of(name)
        if tower is None:
            return args.learning_rate
        own = given[tower]
        decay = 1.0 if args.layer_decay is None else args.layer_decay ** _depth(name, blocks[tower])
        return (args.learning_rate if own is None else own) * decay

    return {name: rate(name) for name in names}


_TOWERS = get_args(Tower)


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return None if found is None else int(found[1])


def _depth(name: str, blocks: int) -> int:
    """Return the number of steps from the top of a tower: 0 above its blocks, 1 in the last of them."""
    block = _block(name)
    if block is not None:
        return blocks - block
    return blocks + 1 if _BELOW_THE_BLOCKS.search(name) else 0


def set_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, args: ContrastivePOConfig) -> None:
    """Divide the groups of a new optimizer so that every parameter has its own learning rate.

    The groups keep all their other settings, such as weight decay. They come in the order of falling rates, so that
    the rate of the first, which `Trainer` logs as `learning_rate`, is the largest.

    Args:
        optimizer: The optimizer, before its first step. Changed in place.
        model: The module whose parameters it holds.
        args: As for `initial_rates`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = initial_rates(names.values(), args)
    divided: list[dict[str, object]] = []
    for group in optimizer.param_groups:
        parts: dict[tuple[float, Tower | None], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            parts.setdefault((rates[name], tower_of(name)), []).append(parameter)
        divided += [
            {**group, "params": part, "lr": rate, "tower": tower or "scale"} for (rate, tower), part in parts.items()
        ]
    optimizer.param_groups[:] = sorted(divided, key=lambda group: -float(str(group["lr"])))


class TowerRatesCallback(TrainerCallback):
    """Remembers the learning rate of each tower in the last step, for the log. `Trainer` logs that of one group alone.

    Attributes:
        rates: Values by name of the logged metric, "learning_rate/vision" and "learning_rate/text", of the towers that
            train: the rate of their final norm and projection. Empty if the optimizer has one learning rate.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rates after a step, before the schedule changes them.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: `optimizer`.
        """
        found: dict[str, float] = {}
        for group in kwargs["optimizer"].param_groups:
            if group.get("tower") in _TOWERS:
                name = f"learning_rate/{group['tower']}"
                found[name] = max(found.get(name, 0.0), float(group["lr"]))
        self.rates = found
