"""A reference that follows the policy (TR-DPO): moved every few steps, and kept with every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clip_po.training.checkpoints import checkpoint_folder, saving

if TYPE_CHECKING:
    from clip_po.trainer import ContrastivePOTrainer

REFERENCE_FILE = "reference.safetensors"
"""In a checkpoint: the weights of the reference, as far as they are not those of the policy."""


class ReferenceSyncCallback(TrainerCallback):
    """Moves the reference towards the policy after every `ref_model_sync_steps` optimizer steps.

    All processes have the same weights, so that each moves its own copy of the reference. TRL's SyncRefModelCallback
    does not fit: it would scale the frozen parameters that reference and policy share, and leaves the reference out of
    checkpoints.

    Args:
        trainer: The trainer, with its policy and its reference.

    Raises:
        ValueError: If the weights of the policy can't be mixed with those of the reference: adapters, a sharded model,
            or a `ref_model` of another architecture.

    Source: Gorbatovski et al. 2024, arXiv 2404.09656.
    """

    def __init__(self, trainer: ContrastivePOTrainer) -> None:
        self.trainer = trainer
        if isinstance(trainer.model, PeftModel):
            raise ValueError(
                "sync_ref_model=True mixes whole weights, but this model trains adapters, whose mean is not the mean "
                "of the models. Train without adapters, or leave sync_ref_model out."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "sync_ref_model=True needs the whole weights in each process, but FSDP and DeepSpeed shard them. "
                "Train with DDP, or leave sync_ref_model out."
            )
        policy, reference = ({n: p.shape for n, p in m.named_parameters()} for m in self._models)
        if policy != reference:
            raise ValueError(
                "sync_ref_model=True mixes the weights of policy and reference, but ref_model has other parameters "
                f"than the model, such as {min(policy.items() ^ reference.items())[0]!r}. Pass a ref_model of the "
                "same architecture, or leave it out."
            )

    @property
    def _models(self) -> tuple[nn.Module, nn.Module]:
        return self.trainer.encoder, self.trainer.reference.model

    def _own_weights(self) -> dict[str, Tensor]:
        """Return the parameters of the reference that it does not share with the policy, by name."""
        policy, reference = self._models
        shared = {id(parameter) for parameter in policy.parameters()}
        return {name: own for name, own in reference.named_parameters() if id(own) not in shared}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the reference as it is now, and load that of the checkpoint from which training resumes.

        Args:
            args: `resume_from_checkpoint`, a folder or None.
            state: Not used.
            control: Not used.
            **kwargs: Not used.

        Raises:
            ValueError: If the checkpoint has no reference, or that of another run.
        """
        reference = self.trainer.reference
        if reference.initial_model is reference.model:
            shared = {id(parameter): parameter for parameter in self.trainer.encoder.parameters()}
            reference.initial_model = copy.deepcopy(reference.model, memo=shared)
        if not args.resume_from_checkpoint:
            return
        file, weights = Path(args.resume_from_checkpoint) / REFERENCE_FILE, self._own_weights()
        stored = load_file(file) if file.is_file() else {}
        if {name: value.shape for name, value in stored.items()} != {name: own.shape for name, own in weights.items()}:
            raise ValueError(
                f"{str(file)!r} does not hold the reference of this run, which has moved since its start. Resume with "
                "sync_ref_model and the trained parts of the run that wrote the checkpoint, or start a new run from "
                f"its weights, model={str(file.parent)!r}."
            )
        self._replace(stored.items())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the reference, if it is time.

        Args:
            args: `ref_model_sync_steps` and `ref_model_mixup_alpha`.
            state: The step.
            control: Not used.
            **kwargs: Not used.
        """
        settings = self.trainer.args
        if state.global_step % settings.ref_model_sync_steps == 0:
            policy, share = dict(self.trainer.encoder.named_parameters()), settings.ref_model_mixup_alpha
            self._replace((name, own.lerp(policy[name], share)) for name, own in self._own_weights().items())

    def _replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.trainer.reference.replace_weights(weights)
        texts = self.trainer.reference.text_embeddings
        if texts is not self.trainer.policy.text_embeddings:  # both have the same if the text tower does not change
            texts.forget()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the reference into the checkpoint.

        Args:
            args: `output_dir`. Processes that do not save do nothing.
            state: The step, which names the checkpoint.
            control: Not used.
            **kwargs: Not used.

        Raises:
            SavingError: If the file can't be written.
        """
        if args.should_save:
            file = checkpoint_folder(args, state) / REFERENCE_FILE
            with saving(file, str(args.output_dir)):
                save_file({name: own.detach().contiguous() for name, own in self._own_weights().items()}, file)
