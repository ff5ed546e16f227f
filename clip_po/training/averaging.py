"""Moving average of the weights along a training run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.atomic_write import atomic_write
from clip_po.training.checkpoints import checkpoint_folder, saving
from clip_po.validation import POSITIVE, check_number

AVERAGE_FILE = "moving_average.safetensors"
"""Name of the file that `BetaMovingAverageCallback` adds to every checkpoint."""


class BetaMovingAverageCallback(TrainerCallback):
    """Callback that averages the weights along a training run and puts the average into the model at its end.

    The weights after step t of T (t = 0: before training) are weighted by the density of Beta(beta, beta) at
    (t + 0.5) / (T + 1). A running mean of the trainable parameters is kept in float32 on their device. Training,
    evaluations and checkpoints use the current weights, not the mean. Each checkpoint also gets the mean so far
    (`moving_average.safetensors`), so that a resumed run ends with the same average bit for bit. A run that is stopped
    early ends with the mean so far. With LoRA the factors A and B are averaged separately, not their product.

    With beta < 1 the first and last steps count most (zero-shot and fine-tuned weights), with beta > 1 the middle
    ones; beta = 1 is the plain mean.

    Example:

        trainer = ContrastivePOTrainer(..., callbacks=[BetaMovingAverageCallback()])
        trainer.train()
        trainer.save_model()  # the averaged weights

    Args:
        beta: Both parameters of the Beta distribution, finite and > 0.

    Raises:
        TypeError: If `beta` is not a number.
        ValueError: If `beta` is out of range. From the trainer: if `load_best_model_at_end=True`, which asks for the
            weights of one step instead; or if a resumed run has other steps, parameters or another beta than before.
        FileNotFoundError: From the trainer: if the checkpoint to resume from has no `moving_average.safetensors`.

    Source: Shu et al. 2023 (CLIPood), arXiv 2302.00864, Sec. 3.3 (there beta = 0.5); Afzali et al. 2025, arXiv
    2411.08923.
    """

    def __init__(self, beta: float = 0.7) -> None:
        check_number("beta", beta, POSITIVE, "1 is the plain mean.")
        self.beta = beta
        self._average: dict[str, Tensor] = {}
        self._weight_sum = 0.0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise if arguments would discard the average.

        Args:
            args: The configuration.
            state: Not used.
            control: Not used.
            **kwargs: Not used.

        Raises:
            ValueError: If `load_best_model_at_end=True`.
        """
        _refuse_best_model(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start from the current weights, or from the mean in the checkpoint that training resumes from.

        Args:
            args: `output_dir` and `resume_from_checkpoint` say where the mean of a resumed run is.
            state: A step above 0 means that training resumes.
            control: Not used.
            model: The model in training. Its trainable parameters are averaged.
            **kwargs: Not used.

        Raises:
            ValueError: If `load_best_model_at_end=True`; or if the stored mean is damaged, or of other steps,
                parameters or another beta.
            FileNotFoundError: If training resumes from a checkpoint without a mean.
        """
        _refuse_best_model(args)
        self._average = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in _trainable(model).items()
        }
        if state.global_step:
            self._restore(_resumed_from(args, state), state)
        else:
            self._weight_sum = self._weight(state)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the weights after an optimizer step to the mean.

        Args:
            args: Not used.
            state: The step, after it was counted, and the number of all steps.
            control: Not used.
            model: The model in training.
            **kwargs: Not used.
        """
        weight = self._weight(state)
        if not weight:
            return
        self._weight_sum += weight
        for name, parameter in _trainable(model).items():
            average = self._average[name]
            average.lerp_(parameter.to(average.dtype), weight / self._weight_sum)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the mean so far to the checkpoint that was just written.

        Args:
            args: `output_dir`. Processes that do not save do nothing.
            state: The step, which names the checkpoint.
            control: Not used.
            **kwargs: Not used.

        Raises:
            SavingError: If the file can't be written.
        """
        if not args.should_save:
            return
        file = checkpoint_folder(args, state) / AVERAGE_FILE
        metadata = {**self._key(state), "weight_sum": repr(self._weight_sum)}
        with saving(file, str(args.output_dir)), atomic_write(file) as partial:
            save_file({name: average.contiguous() for name, average in self._average.items()}, partial, metadata)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Put the mean into the model.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            model: The model in training. Its trainable parameters are overwritten.
            **kwargs: Not used.
        """
        for name, parameter in _trainable(model).items():
            parameter.copy_(self._average[name])
        self._average = {}

    def _weight(self, state: TrainerState) -> float:
        """Return the density of Beta(beta, beta) at this step relative to the middle; 0 after the last step."""
        place = (state.global_step + 0.5) / (state.max_steps + 1)
        return (4 * place * (1 - place)) ** (self.beta - 1) if place < 1 else 0.0

    def _key(self, state: TrainerState) -> dict[str, str]:
        """Return the metadata that a stored mean must have for this run to continue it."""
        return {"beta": repr(float(self.beta)), "step": str(state.global_step), "steps": str(state.max_steps)}

    def _restore(self, file: Path, state: TrainerState) -> None:
        with _opened(file) as stored:
            metadata, names = stored.metadata() or {}, set(stored.keys())
            wanted = self._key(state)
            if (found := {name: metadata.get(name) for name in wanted}) != wanted:
                raise ValueError(
                    f"{file} holds the mean of weights for {found}, but this run is at {wanted}: the weights of all "
                    "steps depend on beta and on the number of steps. Resume with the settings of the run that was "
                    "interrupted, or start a new run."
                )
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in names}
            if shapes != {name: tuple(average.shape) for name, average in self._average.items()}:
                differ = sorted(names.symmetric_difference(self._average)) or sorted(names)
                raise ValueError(
                    f"{file} holds the mean of other parameters than the trained ones (such as {differ[0]!r}). "
                    "Resume with the same model, adapters and trained parts as before, or start a new run."
                )
            for name, average in self._average.items():
                average.copy_(stored.get_tensor(name))
        self._weight_sum = float(metadata["weight_sum"])


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a safetensors file ({error}), so BetaMovingAverageCallback did not write it, or it is "
            "damaged. Resume from an earlier checkpoint, resume without the callback, or start a new run."
        ) from error


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    return {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}


def _refuse_best_model(args: TrainingArguments) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True with BetaMovingAverageCallback: the model can end with the weights of the "
            "best checkpoint or with the average over all steps, not with both. Set load_best_model_at_end=False, "
            "or leave the callback out."
        )


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the file in the checkpoint that training resumes from. Trainer does not pass its folder to callbacks."""
    files = [checkpoint_folder(args, state) / AVERAGE_FILE]
    given = args.resume_from_checkpoint
    if isinstance(given, (str, os.PathLike)) and Path(given).is_dir():
        files.insert(0, Path(given, AVERAGE_FILE))
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"BetaMovingAverageCallback found no mean of the first {state.global_step} steps: there is no "
        f"{' and no '.join(map(str, files))}. If the checkpoint was written without this callback, or was "
        "cut off, resume from an earlier one, resume without the callback, or start a new run."
    )
