"""Training that stops before its weights are spoiled: a loss or gradient that is no finite number ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clip_po.training.checkpoints import last_whole_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class StopsWhereNotFinite(_Base):
    """What a trainer does so that no optimizer step is taken on gradients that hold nan or infinity.

    Trainer computes the norm of the gradients of all processes between the backward pass and the optimizer's step,
    and does not look at it. Its method that does so is replaced to look: one question to the device a step, in place
    of the two a batch of `logging_nan_inf_filter`, which is off by default here and only hides the loss in the log.
    """

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        loss = self._tr_loss  # summed since the last log, and never nan since a step that was taken
        if norm is None or bool(torch.isfinite(loss + norm)):
            return norm
        scaler = self.accelerator.scaler
        if bool(torch.isfinite(loss)) and scaler is not None and scaler.get_scale() > 1:
            return norm  # float16 overflowed under too large a scale: the step is skipped, and the scale is halved
        raise FloatingPointError(self._what_is_not_finite(loss, norm))

    def _what_is_not_finite(self, loss: Tensor, norm: Tensor | float) -> str:
        # Of this process alone: another may not have come here.
        means = self._means[True].pop(lambda sums: sums)
        parts = [name for name, mean in means.items() if not torch.isfinite(torch.tensor(mean))]
        found = f"the norm of the gradients is {float(norm):g}"
        if not torch.isfinite(loss):
            found = f"the loss is {float(loss):g} and {found}"
        spoiled = [name for name, weight in self.model.named_parameters() if not bool(torch.isfinite(weight).all())]
        if spoiled:
            return (
                f"Training stopped at step {self.state.global_step + 1}: {found}, as the weights hold nan or infinity "
                f"already, such as {spoiled[0]!r}. Start from another model, or resume from an earlier checkpoint."
            )
        named = f" Not finite: {', '.join(parts)}." if parts else ""
        if torch.isfinite(loss) and not parts:
            named = " Every part of the loss is finite."
        last = last_whole_checkpoint(str(self.args.output_dir))
        resume = f"or go on from {last!r} by resume_from_checkpoint=True" if last else "and train anew"
        half = "train in bf16 or float32 instead of fp16, " if self.args.fp16 else ""
        return (
            f"Training stopped at step {self.state.global_step + 1}: {found}.{named} The step was not taken, so the "
            f"weights are still those of step {self.state.global_step}. Lower learning_rate "
            f"(now {self.args.learning_rate:g}) or max_grad_norm (now {self.args.max_grad_norm:g}), {half}look for "
            f"losses that grow in the log, {resume}."
        )
