"""The trainer: wiring only. `compute_loss` is the method's equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPModel, PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput
from transformers.utils import logging

from clip_po.candidates import in_batch_candidates
from clip_po.concept.policy import ConceptPolicy
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ADAMAX, ContrastivePOConfig, check_args
from clip_po.data.collator import DataCollatorForContrastivePreference, row_weights
from clip_po.data.formats import check_candidates
from clip_po.data.pairs import PreferencePairs
from clip_po.feeding import FeedsRows
from clip_po.hub.publishing import SafePublishing
from clip_po.hub.safe_loading import SafeLoading
from clip_po.losses import REFERENCED, LossSettings, PreferenceLogps, preference_loss
from clip_po.metrics import RunningMeans, preference_metrics
from clip_po.models import (
    check_concept,
    check_processor,
    default_output_dir,
    load_policy,
    load_processor,
    without_new_adapters,
)
from clip_po.policy import (
    FrozenTexts,
    Policy,
    dual_encoder,
    encode_texts,
    encode_texts_autocast,
    frozen_copy,
    preference_logps,
    regularization_kl,
)
from clip_po.reference import SEES, ReferencePolicy
from clip_po.training.activation_checkpointing import NoInputGradients
from clip_po.training.checkpoints import CheckpointMark, WholeCheckpoints, whole_checkpoint
from clip_po.training.nan_guard import StopsWhereNotFinite
from clip_po.training.resuming import ResumesExactly
from clip_po.training.sharding import allow_sharding

logger = logging.get_logger(__name__)

SMALLEST_WEIGHT = 1e-8
"""Stands in for a sum of weights that is 0, so that a batch of nothing but padding has the gradient 0."""


class ContrastivePOTrainer(
    SafePublishing, SafeLoading, WholeCheckpoints, ResumesExactly, StopsWhereNotFinite, FeedsRows, Trainer
):
    """Trainer for preference optimization of contrastive vision-language models.

    The softmax over candidate texts is a policy; DPO, IPO or KTO moves it towards the chosen texts, and
    KL(reference || policy) on ordinary images holds the rest.

    Args:
        model (`str`, `CLIPModel` or `PeftModel`): The policy. A name or folder is loaded in float32.
        ref_model (`CLIPModel`, *optional*): The reference policy. Default: the policy as training starts, that is
            without adapters where `peft_config` is given, with its adapters where `model` is a `PeftModel`.
        args (`ContrastivePOConfig`, *optional*): Settings; the defaults write to `<model>-PO`.
        data_collator (`Callable`, *optional*): Default: `DataCollatorForContrastivePreference`.
        train_dataset (`datasets.Dataset` or `TypographicPreferences`): Preferences, in a format of
            `clip_po.data.formats`. A `datasets.IterableDataset` or `TypographicStream` is read as it comes; it needs
            `max_steps`.
        eval_dataset (the same but no stream, or a `dict` of them, *optional*): Preferences to evaluate on.
        processing_class (`CLIPProcessor`, *optional*): Default: loaded from where the model came from.
        compute_metrics (`Callable`, *optional*): Takes an `EvalPrediction` of one batch (log-probabilities [B, N]
            and positions of the chosen texts [B]) and `compute_result`; needs `batch_eval_metrics=True`.
        callbacks, optimizers: As for `Trainer`. `optimizers` wins over what the arguments say.
        peft_config (`PeftConfig`, *optional*): Adapters to add to a plain model.
        reg_dataset (`datasets.Dataset`, *optional*): Ordinary images in a column `image`. Default: the
            `clean_image` of each preference.
        candidate_texts (`list[str]`, *optional*): The texts among which the policy of every row chooses; by
            default each row names its own.
        concept (`ConceptTransform`, *optional*): Train this transformation of the model's embeddings, and nothing
            of the model, with `penalty_weight` times its penalty in the loss; `trainer.model` is the transformation.

    Raises:
        ValueError, TypeError: Something does not fit together; the message says what, where and what to do.

    Source: Afzali et al. 2025, arXiv 2411.08923.
    """

    args: ContrastivePOConfig
    model: PreTrainedModel | PeftModel
    processing_class: ProcessorMixin
    train_dataset: PreferencePairs | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: ContrastivePOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction, bool], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (
            None,
            None,
        ),
        peft_config: PeftConfig | None = None,
        reg_dataset: Dataset | None = None,
        candidate_texts: Sequence[str] | None = None,
        concept: ConceptTransform | None = None,
    ) -> None:
        args = args if args is not None else ContrastivePOConfig(default_output_dir(model))
        check_args(args, compute_metrics, candidate_texts)
        check_candidates(candidate_texts)
        self.candidate_texts = None if candidate_texts is None else list(candidate_texts)
        model = load_policy(model, ref_model, args, peft_config)
        if concept is not None:
            check_concept(concept, model, ref_model, args, peft_config)
        processing_class = processing_class or load_processor(model, args)
        for checked in (model, ref_model) if ref_model is not None else (model,):
            check_processor(processing_class, checked)
        self.reg_dataset = reg_dataset
        pairs: PreferencePairs | None = None
        evaluated: Any = None
        if train_dataset is not None:
            pairs = self._training_pairs(train_dataset, args, concept)
        if isinstance(eval_dataset, (dict, DatasetDict)):
            several = eval_dataset.items()
            evaluated = {name: self._evaluation_pairs(rows, args, f"eval_dataset[{name!r}]") for name, rows in several}
        elif eval_dataset is not None:
            evaluated = self._evaluation_pairs(eval_dataset, args)

        self.concept = concept
        super().__init__(
            model=model if concept is None else concept,
            args=args,
            data_collator=data_collator
            or DataCollatorForContrastivePreference(processing_class, self.candidate_texts),
            train_dataset=pairs,
            eval_dataset=evaluated,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the weights of the whole accumulated global batch itself.
        self.model_accepts_loss_kwargs = True
        self.add_callback(NoInputGradients())
        self.add_callback(
            CheckpointMark(self.accelerator.wait_for_everyone, self.callback_handler, self.publish_checkpoint)
        )
        # Gradients live in DDP's buckets, not beside them: one copy less of all that trains.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.encoder: CLIPModel = dual_encoder(model).to(self.accelerator.device)
        if self.is_fsdp_enabled:
            allow_sharding(self.encoder)
        self.loss_settings = LossSettings(
            args.beta, args.label_smoothing, args.desirable_weight, args.undesirable_weight
        )
        if concept is not None:
            reference = model.requires_grad_(False).eval()  # which nothing changes
        elif ref_model is None:
            reference = without_new_adapters(frozen_copy(self.model), peft_config)
        else:
            reference = ref_model.requires_grad_(False).eval().to(self.accelerator.device)
        self._rewarded = bool(REFERENCED & set(args.loss_type))
        sees = SEES if self._rewarded and not args.reference_free else SEES[1:]
        # Where the text tower trains, bfloat16's error would else stand on one side of the log-ratios alone.
        encode = encode_texts_autocast if args.train_text_model else encode_texts
        texts = FrozenTexts(reference, processing_class, encode)
        self.reference = ReferencePolicy(reference, processing_class, self.candidate_texts, texts, sees)
        # Of the two that share a frozen text tower the reference's is asked: the policy's may get sharded.
        if ref_model is not None:
            texts = FrozenTexts(frozen_copy(model) if self.is_fsdp_enabled else model, processing_class)
        self.policy: Policy | ConceptPolicy = Policy(
            processing_class, self.candidate_texts, None if args.train_text_model else texts
        )
        if concept is not None:
            self.policy = ConceptPolicy(self.reference)
        self._means = {True: RunningMeans(), False: RunningMeans()}

    # ---- The method ----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Preference loss + reg_weight * KL(reference || policy), means over the accumulated global batch.

        Args:
            model: The model as wrapped for training.
            inputs: A batch, as `DataCollatorForContrastivePreference` makes it.
            return_outputs: Also return the log-probabilities over the candidates.
            num_items_in_batch: Tensor[2], the weights of the preferences and of the ordinary images in the
                accumulated global batch, from `get_batch_samples`; those of `inputs` alone where it is None.

        Returns:
            The loss, Tensor[], scaled so that its sum over accumulation steps, averaged over processes, is the
            mean; with `return_outputs` also {"logps": Tensor[B, N]}.

        Source: Afzali et al. 2025, arXiv 2411.08923.
        """
        policy = self.policy(model, self.encoder, inputs)
        with self.accelerator.autocast():  # accelerate gives it to the model's own forward alone
            reference = self.reference(inputs)
        logps = preference_logps(policy, reference, inputs)
        kl = regularization_kl(policy, reference)
        weight, clean = inputs["weight"], inputs["reg_row_weight"]  # of each row; 0 for padding
        total, clean_total = self._totals(inputs) if num_items_in_batch is None else num_items_in_batch

        losses = preference_loss(
            logps, self.args.loss_type, self.args.weights, self.loss_settings, self._reference_point(kl, clean)
        )
        loss = (weight * losses).sum() / total + self.args.reg_weight * (clean * kl).sum() / clean_total
        if self.concept is not None:  # the batch's share of it: micro-batches and processes add up to one penalty
            loss = loss + self.args.penalty_weight * self.concept.penalty() * weight.sum() / total

        self._log_rows(logps, losses, kl, inputs)
        if num_items_in_batch is not None:  # processes average their gradients, but the sums above are to be added
            loss = loss * self.accelerator.num_processes
        return (loss, {"logps": policy.preference}) if return_outputs else loss

    def _reference_point(self, kl: Tensor, weight: Tensor) -> Tensor | None:
        """KTO's z0: the KL of the global micro-batch, of all processes, since it stands inside a sigmoid."""
        if "kto_pair" not in self.args.loss_type:
            return None
        sums = self._sum_over_processes(torch.stack([(weight * kl.detach()).sum(), weight.sum()]))
        return sums[0] / sums[1].clamp(min=SMALLEST_WEIGHT)

    def _totals(self, *batches: Mapping[str, Any]) -> Tensor:
        """Weights of the preferences and of the ordinary images in batches, Tensor[2]; where all are 0, not 0 / 0."""
        return torch.stack([row_weights(batch) for batch in batches]).sum(dim=0).clamp(min=SMALLEST_WEIGHT)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of an optimizer step, and the weights of their rows over all processes, Tensor[2]."""
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed: Trainer takes a step too many
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        return batches, self._sum_over_processes(self._totals(*batches).to(device))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    # ---- Metrics -------------------------------------------------------------------------------------------

    def _log_rows(self, logps: PreferenceLogps, losses: Tensor, kl: Tensor, inputs: Mapping[str, Any]) -> None:
        reg = {"kl": kl, "loss/regularization": self.args.reg_weight * kl}
        metrics = {
            **preference_metrics(logps, losses, self.args.beta, inputs["weight"]),
            **{name: (value.detach(), inputs["reg_row_weight"]) for name, value in reg.items()},
        }
        if not self._rewarded:  # without log-ratios there are no rewards
            metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
        self._means[self.model.training].add(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the rows seen since the last log."""
        if "loss" in logs:  # of Trainer's own logs of training steps, which every process writes
            logs = {**logs, **self._means[True].pop(self._sum_over_processes)}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Evaluate a batch: its rows go into running means; nothing is kept of it unless metrics ask for it.

        Returns:
            No loss; the log-probabilities [B, N] and positions of the chosen texts [B] where they are asked for.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (None, None, None) if prediction_loss_only else (None, outputs["logps"], inputs["chosen"])

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; every row counts once, whatever the number of processes and the size of the last batch."""
        self._means[False] = RunningMeans()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._means[False].pop(self._sum_over_processes)
        means["loss"] = means.get("loss/preference", 0.0) + means.get("loss/regularization", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`, but from whole checkpoints only; `args.resume_from_checkpoint` says from which."""
        folder = whole_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        self.args.resume_from_checkpoint = folder
        self._means[True] = RunningMeans()
        return super().train(folder, *args, **kwargs)

    # ---- Data ----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return in_batch_candidates(inputs) if self.args.in_batch_candidates else inputs

    # ---- Optimizer -----------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """The optimizer and its arguments: those of `Trainer`, and torch's Adamax for `optim="adamax"`."""
        if args.optim == ADAMAX:
            betas = (args.adam_beta1, args.adam_beta2)
            return torch.optim.Adamax, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters that weight decay pulls to 0: none for which 0 has no meaning, scales and embeddings."""
        without = ("logit_scale", "class_embedding", "position_embedding", "image_weight", "text_weight")
        return [n for n in super().get_decay_parameter_names(model) if not any(part in n for part in without)]
