"""ConceptTrainer: trains a linear transformation of a model's embeddings instead of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from clip_po.candidate_logps import batch_logps
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.collator import FEWEST_ROWS, row_totals
from clip_po.data.pairs import PreferencePairs
from clip_po.data.streamed_pairs import StreamedPairs, is_stream
from clip_po.dual_encoder import as_dual_encoder
from clip_po.hub.card import CheckpointKind
from clip_po.models import default_output_dir, load_policy
from clip_po.policy import DIVERGENCES, CandidateLogps, known_image_embeds
from clip_po.reference import ReferencePolicy
from clip_po.trainer import ContrastivePOTrainer
from clip_po.training.activation_checkpointing import checkpoints_activations
from clip_po.validation import NOT_NEGATIVE, Allowed
from clip_po.weights import to_float32


@dataclass(repr=False)  # the inherited one hides secrets
class ConceptConfig(ContrastivePOConfig):
    """Configuration of the [`ConceptTrainer`], beyond the arguments of [`ContrastivePOConfig`].

    Args:
        penalty_weight (`float`, defaults to `0.1`): Weight of the penalty ||I - W W^T||_F, >= 0.

    Raises:
        TypeError, ValueError: As for [`ContrastivePOConfig`].
    """

    penalty_weight: float = field(default=0.1, metadata={"help": "Weight of the penalty ||I - W W^T||_F, >= 0."})

    def _numbers(self) -> dict[str, Allowed]:
        return {**super()._numbers(), "penalty_weight": NOT_NEGATIVE}


class ConceptPolicy:
    """pi(y | x) on transformed embeddings of the reference. No tower runs.

    Args:
        reference: The frozen model, which is the reference policy too.
    """

    def __init__(self, reference: ReferencePolicy) -> None:
        self.reference = reference

    def __call__(self, model: nn.Module, encoder: nn.Module, batch: Mapping[str, Any]) -> CandidateLogps:
        """Compute log-probabilities over the candidate texts, as `Policy` does.

        Args:
            model: The `ConceptTransform` as wrapped for training.
            encoder: The CLIPModel. Its logit scale is that of the reference.
            batch: Batch of `ReferencePolicy.embedded`.

        Returns:
            Tensor[B, N] for the preference images, and for the regularization images if there are any.
        """
        images = known_image_embeds(batch)
        candidates, reg_texts = self.reference.candidates, batch.get("reg_texts", [])
        texts = self.reference.text_embeddings(candidates.of_batch(batch))
        if reg_texts:
            texts = torch.cat([texts, self.reference.text_embeddings(reg_texts)])
        image_embeds, text_embeds = model(torch.cat([*images.values()]), texts)
        embeds = dict(zip(images, image_embeds.split([*map(len, images.values())]), strict=True))
        text_embeds, reg_embeds = text_embeds.split([len(texts) - len(reg_texts), len(reg_texts)])
        scale, bias, shared = self.reference.logit_scale, self.reference.logit_bias, candidates.are_shared(batch)
        logps = batch_logps(embeds, text_embeds, reg_embeds, scale, batch, shared, bias)
        return CandidateLogps(logps["image"], logps.get("reg_image"), divergence=DIVERGENCES[self.reference.kind])


class ConceptTrainer(ContrastivePOTrainer):
    """Trainer for a concept's linear transformation W of frozen embeddings, with the losses of the method.

    `trainer.model` is the transformation. `trainer.encoder` is the model, which does not change and is its own
    reference. Images are embedded once, so that a step costs a matrix product.

    Args:
        model (`str`, `CLIPModel` or `PeftModel`): The model whose embeddings are transformed.
        concept (`ConceptTransform`): The transformation to train.
        args (`ConceptConfig`, *optional*): Settings. The defaults write to `<model>-PO`.
        train_dataset (`datasets.Dataset` or `TypographicPreferences`): Preferences; no stream.
        data_collator, eval_dataset, processing_class, compute_metrics, callbacks, optimizers, reg_dataset,
            candidate_texts: As in `ContrastivePOTrainer`.

    Raises:
        ValueError, TypeError: If arguments do not fit together. The message says what, where and what to do.

    Source: Afzali et al. 2025, arXiv 2411.08923.
    """

    args: ConceptConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        concept: ConceptTransform,
        args: ConceptConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction, bool], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        reg_dataset: Dataset | None = None,
        candidate_texts: Sequence[str] | None = None,
    ) -> None:
        args = args if args is not None else ConceptConfig(default_output_dir(model))
        _check_args(concept, args)
        self.concept = concept
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            reg_dataset=reg_dataset,
            candidate_texts=candidate_texts,
        )

    def load_encoder(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        args: ContrastivePOConfig,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | PeftModel:
        """Load the dual encoder, and raise if its embeddings do not fit the transformation.

        Args:
            model: As in the trainer.
            ref_model: None. The model is its own reference.
            args: The checked configuration.
            peft_config: None. The model gets no new adapters.

        Returns:
            The model, whose parameters `build_reference` freezes.

        Raises:
            ValueError: If the size of its embeddings is not that of the transformation, or as for `load_policy`.
            TypeError, OSError: As for `load_policy`.
        """
        encoder = load_policy(model, ref_model, args, peft_config)
        dim = as_dual_encoder(encoder).dim
        if self.concept.dim != dim:
            raise ValueError(
                f"concept transforms embeddings of {self.concept.dim} dimensions, but the model's have {dim}. Pass "
                f"ConceptTransform({dim})."
            )
        return encoder

    def module_to_train(self, encoder: PreTrainedModel | PeftModel) -> nn.Module:
        """Return the transformation, the only thing that `Trainer` trains and saves.

        Args:
            encoder: From `load_encoder`. Not read.

        Returns:
            `concept` of the trainer.
        """
        to_float32(self.concept, "concept")
        return self.concept

    def training_rows(self, dataset: Any, args: ContrastivePOConfig) -> PreferencePairs | StreamedPairs:
        """Check the training data set, which has a length: its images are embedded once.

        Args:
            dataset: `train_dataset` of the trainer, not None.
            args: The configuration.

        Returns:
            The preferences with their regularization images.

        Raises:
            ValueError: If the data set is streamed, or its rows can't be used.
            TypeError: If it is not a data set.
        """
        if is_stream(dataset):
            raise ValueError(
                "train_dataset is streamed, but a concept's transformation is trained on embeddings that are computed "
                "once and used in many steps. Load the data without streaming=True."
            )
        return super().training_rows(dataset, args)

    def build_reference(
        self, encoder: nn.Module, ref_model: nn.Module | None, peft_config: PeftConfig | None
    ) -> ReferencePolicy:
        """Use the frozen model itself as the reference.

        Args:
            encoder: From `load_encoder`. It is frozen and moved to the device of the trainer, not copied.
            ref_model: Not read.
            peft_config: Not read.

        Returns:
            The reference policy.
        """
        return super().build_reference(encoder, encoder, None)

    def build_policy(self, encoder: nn.Module, ref_model: nn.Module | None) -> ConceptPolicy:
        """Build the policy on transformed embeddings of the reference.

        Args:
            encoder: Not read.
            ref_model: Not read.

        Returns:
            The policy, with the logit scale of the reference.
        """
        return ConceptPolicy(self.reference)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the loss of `ContrastivePOTrainer` + penalty_weight * ||I - W W^T||_F.

        Each micro-batch and process adds a share of the penalty, in proportion to its rows.

        Args:
            model: The transformation as wrapped for training.
            inputs: As for `ContrastivePOTrainer.compute_loss`.
            return_outputs: As for `ContrastivePOTrainer.compute_loss`.
            num_items_in_batch: As for `ContrastivePOTrainer.compute_loss`.

        Returns:
            As from `ContrastivePOTrainer.compute_loss`, with the penalty in the loss. The logged loss of an evaluation
            leaves the penalty out.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        totals = row_totals(inputs) if num_items_in_batch is None else num_items_in_batch
        penalty, rows = self.args.penalty_weight * self.concept.penalty(), inputs["counted"].sum()
        if self.model.training:
            self.training_means.add({"loss/penalty": (penalty.detach().reshape(1), rows.reshape(1))})
        share = rows / totals[0].clamp(min=FEWEST_ROWS)
        loss = loss + penalty * share * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    @property
    def checkpoint_kind(self) -> CheckpointKind:
        """What checkpoints hold, for the model card."""
        return "concept"


def _check_args(concept: Any, args: Any) -> None:
    if not isinstance(concept, ConceptTransform):
        raise TypeError(f"concept must be a ConceptTransform, got {type(concept).__name__}.")
    if not isinstance(args, ConceptConfig):
        raise TypeError(f"args must be a ConceptConfig, got {type(args).__name__}.")
    given = {
        "train_vision_model=False": not args.train_vision_model,
        "train_text_model=True": args.train_text_model,
        "train_logit_scale=True": args.train_logit_scale,
        f"trainable_layers={args.trainable_layers}": args.trainable_layers is not None,
        **{f"{name}={value!r}": True for name, value in args.learning_rates.items()},
        f"tower_chunk_size={args.tower_chunk_size}": args.tower_chunk_size is not None,
        "disable_dropout=False": not args.disable_dropout,
        "sync_ref_model=True": args.sync_ref_model,
        "activation_checkpointing=True": checkpoints_activations(args),
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)} has no effect: ConceptTrainer trains a transformation of embeddings, and the "
            "model itself does not change. Leave the arguments out."
        )
    compared = [f"reg_type={args.reg_type!r}"] * (args.reg_type != "kl")
    compared += [f"loss_type {name!r}" for name in args.loss_type if name == "embedding_distillation"]
    if compared:
        raise ValueError(
            f"{' and '.join(compared)} compares image embeddings before and after, but a transformation changes those "
            "of texts with them. Use reg_type='kl' and losses of log-probabilities."
        )
