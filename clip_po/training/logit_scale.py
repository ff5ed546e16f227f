"""The upper bound of a trained logit scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.models import dual_encoder

LARGEST_LOGIT_SCALE = math.log(100)
"""Upper bound of the logit scale, before exp. Source: Radford et al. 2021, arXiv 2103.00020, Sec. 2.5."""


class LogitScaleCallback(TrainerCallback):
    """Callback that clamps a trained logit scale at ln 100 after each optimizer step, as CLIP does.

    A larger scale makes the same cosines more certain without end. A scale that does not train is not changed.
    """

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Clamp the logit scale.

        Args:
            args: `train_logit_scale` is read.
            state: Not used.
            control: Not used.
            model: The model in training.
            **kwargs: Not used.
        """
        if args.train_logit_scale and (scale := dual_encoder(model).logit_scale).requires_grad:
            scale.clamp_(max=LARGEST_LOGIT_SCALE)
