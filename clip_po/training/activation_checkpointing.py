"""Activation checkpointing without gradients for the inputs of the towers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.models import dual_encoder

TRANSFORMERS_OWN = {"every_n_layers", "offload"}
"""Keys of `activation_checkpointing_kwargs` that transformers does not pass on to torch."""


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Return whether activations are checkpointed. transformers 5.23 renamed `gradient_checkpointing`.

    Args:
        args: The configuration, of any version of transformers.

    Returns:
        True if either name is set.
    """
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


class NoInputGradientsCallback(TrainerCallback):
    """Callback that stops the backward pass at the lowest trained layer when activations are checkpointed.

    With activation checkpointing, transformers makes the inputs of both towers require gradients. Only the reentrant
    kind needs that; the default is the other kind. With adapters on the last blocks, all blocks below would be
    recomputed for gradients that nothing uses, and torch.compile would break its graph at the input of each tower.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Remove the hooks that `Trainer.train` has just set.

        Args:
            args: Says whether activations are checkpointed, and whether by the reentrant kind.
            state: Not used.
            control: Not used.
            model: The model in training. Only read if activations are checkpointed.
            **kwargs: Not used.
        """
        given = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
        # If torch gets other arguments but not use_reentrant, its own default applies: reentrant.
        reentrant = given.get("use_reentrant", bool(given.keys() - TRANSFORMERS_OWN))
        if checkpoints_activations(args) and not reentrant:
            dual_encoder(model).disable_input_require_grads()
