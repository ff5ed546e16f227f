"""Activation checkpointing that adds no gradients below the trained parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.policy import dual_encoder

TRANSFORMERS_OWN = {"every_n_layers", "offload"}
"""Of `activation_checkpointing_kwargs`, those that do not go to torch."""


class NoInputGradientsCallback(TrainerCallback):
    """Lets no gradient flow below what trains where activations are checkpointed.

    With activation checkpointing transformers makes the inputs of both towers require gradients, which the reentrant
    kind needs and the other, its default, does not. Below adapters on the last blocks, all blocks would be run once
    more for gradients that go nowhere; and torch.compile would break its graph at the input of either tower.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take away the hooks that `Trainer.train` has just set."""
        given = args.gradient_checkpointing_kwargs or {}
        # torch's own default, where it gets arguments and this is none of them, is the reentrant kind.
        reentrant = given.get("use_reentrant", bool(given.keys() - TRANSFORMERS_OWN))
        if args.gradient_checkpointing and not reentrant:
            dual_encoder(model).disable_input_require_grads()
