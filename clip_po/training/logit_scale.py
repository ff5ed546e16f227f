"""The upper bound of a trained logit scale."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.dual_encoder import as_dual_encoder


class LogitScaleCallback(TrainerCallback):
    """Callback that clamps a trained logit scale at ln 100 after each optimizer step, as CLIP does.

    A larger scale makes the same cosines more certain without end. A scale that does not train is not changed.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Clamp the logit scale, as far as it trains.

        Args:
            args: `train_logit_scale` is read.
            state: Not used.
            control: Not used.
            model: The model in training.
            **kwargs: Not used.
        """
        if args.train_logit_scale:
            as_dual_encoder(model).bound_scale()
