"""The NaN guard: stops training before an optimizer step on a loss or gradients that are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.metrics import loss_of_parts
from clip_po.training.checkpoints import last_whole_checkpoint

if TYPE_CHECKING:
    from clip_po.trainer import ContrastivePOTrainer


class NanGuardCallback(TrainerCallback):
    """Raises before the optimizer step if the loss or a gradient is NaN or infinite.

    The weights are then still those of the step before. The check asks the device one question a step, which replaces
    the two a batch of `logging_nan_inf_filter`; that filter only hides the loss in the log and is off by default here.

    Args:
        trainer: The trainer, for its running means, accelerator and arguments. The norm that its accelerator computes
            to clip gradients is kept: after clipping, gradients no longer tell whether they were infinite.

    Attributes:
        norm: Norm of the gradients of all processes before they were clipped, until the callback has checked it.
    """

    def __init__(self, trainer: ContrastivePOTrainer) -> None:
        self.trainer = trainer
        self.norm: Any = None
        clip = trainer.accelerator.clip_grad_norm_

        def clip_and_keep_norm(*args: Any, **kwargs: Any) -> Any:
            self.norm = clip(*args, **kwargs)
            return self.norm

        trainer.accelerator.clip_grad_norm_ = clip_and_keep_norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the loss since the last log and the gradients of all processes.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            model: The model in training, with gradients.
            **kwargs: Not used.

        Raises:
            FloatingPointError: If one of them is not finite. The message says which, and what to do.
        """
        norm, self.norm = self.norm, None
        if norm is None:  # Trainer clips gradients on several device meshes itself
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not gradients:  # DeepSpeed keeps them to itself and has taken the step: only weights can tell
                self.check_weights()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)  # FSDP2 shards gradients
        loss_is_finite = self.trainer.training_means.loss_is_finite(norm.device)
        if bool(norm.isfinite() & loss_is_finite):
            return
        scaler = self.trainer.accelerator.scaler
        if bool(loss_is_finite) and scaler is not None and scaler.get_scale() > 1:
            return  # float16 overflowed because the scale is too large: the step is skipped and the scale halved
        raise FloatingPointError(self._describe(model, float(norm)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the trained weights, which no further step does.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.

        Raises:
            FloatingPointError: As for `check_weights`.
        """
        self.check_weights()

    def check_weights(self) -> None:
        """Raise if a step left weights that are not finite. Every process must call this method.

        Raises:
            FloatingPointError: If a trained weight of any process is NaN or infinite.
        """
        parameters = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        broken = [name for name, parameter in parameters.items() if not _is_finite(parameter)]
        accelerator = self.trainer.accelerator
        if not accelerator.reduce(torch.tensor(float(len(broken)), device=accelerator.device), "sum"):
            return
        named = f", for instance {broken[0]!r}" if broken else ""
        raise FloatingPointError(
            f"Training stopped after step {self.trainer.state.global_step}: weights are not finite{named}. They are "
            f"not saved. Lower learning_rate (now {self.trainer.args.learning_rate:g}), or {self._way_back()}."
        )

    def _way_back(self) -> str:
        last = last_whole_checkpoint(str(self.trainer.args.output_dir))
        return f"resume from {last!r} with resume_from_checkpoint=True" if last else "start a new run"

    def _describe(self, model: nn.Module, norm: float) -> str:
        trainer, args = self.trainer, self.trainer.args
        step = trainer.state.global_step
        # The means of this process alone: another process may not get here.
        means = trainer.training_means.pop(lambda sums: sums)
        parts = [name for name, mean in means.items() if not math.isfinite(mean)]
        loss = loss_of_parts(means)
        found = f"the norm of the gradients is {norm:g}"
        if not math.isfinite(loss):
            found = f"the loss is {loss:g} and {found}"
        broken = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
        if broken:
            return (
                f"Training stopped at step {step + 1}: {found}, because the weights already hold nan or infinity, for "
                f"instance {broken[0]!r}. Start from another model, or resume from an earlier checkpoint."
            )
        named = f" Not finite: {', '.join(parts)}." if parts else ""
        if not parts:
            named = " Every part of the loss is finite."
        half = "train in bf16 or float32 instead of fp16, " if args.fp16 else ""
        return (
            f"Training stopped at step {step + 1}: {found}.{named} The step was not taken, so the weights are still "
            f"those of step {step}. Lower learning_rate (now {args.learning_rate:g}) or max_grad_norm (now "
            f"{args.max_grad_norm:g}), {half}look for losses that grow in the log, or {self._way_back()}."
        )


def _is_finite(parameter: nn.Parameter) -> bool:
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2 shards parameters
    return bool(own.isfinite().all())
