"""The trainer. `compute_loss` is the equation of the method; everything else is wiring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput

from clip_po.candidates import CandidateTexts, in_batch_candidates
from clip_po.chunked_towers import check_chunks
from clip_po.config import ADAMAX, ContrastivePOConfig, check_args
from clip_po.data.bad_images import SkippedRows
from clip_po.data.collator import FEWEST_ROWS, DataCollatorForContrastivePreference, row_totals
from clip_po.data.embedding_cache import EmbeddingCache
from clip_po.data.generic_images import mixed_preferences
from clip_po.data.idle_data import warn_of_idle_data
from clip_po.data.killed_workers import killed_workers_explained
from clip_po.data.pairs import EvaluationPairs, PreferencePairs, checked_pairs
from clip_po.data.regularization_texts import regularization_texts, warn_of_few_texts
from clip_po.data.row_loader import row_loader
from clip_po.data.sampler import EpochSampler
from clip_po.data.stream_reader import StreamMark
from clip_po.data.streamed_pairs import StreamedPairs, checked_stream, is_stream
from clip_po.encoding import CachedTextEmbeddings, encode_texts, encode_texts_autocast
from clip_po.evaluation.report.summary import measured_table
from clip_po.evaluation.training_drift import TrainingDrift
from clip_po.hub.card import CARD_FILE, CheckpointKind, card_of_run
from clip_po.hub.publishing import creating_repository, push_model, save_pretrained
from clip_po.hub.stale_files import check_not_base, remove_stale_files
from clip_po.losses import ANCHORED, REFERENCED, LossSettings, PreferenceLogps, preference_loss, readers
from clip_po.metrics import RunningMeans, loss_of_parts, preference_metrics
from clip_po.models import check_processor, default_output_dir, dual_encoder, load_policy, load_processor
from clip_po.policy import CandidateLogps, Policy, preference_logps, regularization_kl, regularization_loss
from clip_po.reference import ROW_IMAGES, ReferencePolicy, embed_fixed_images, frozen_copy, initial_policy
from clip_po.text_identity import TextTokens
from clip_po.trainable import WITHOUT_DECAY, check_optimizer, choose_trainable, tower_trains
from clip_po.trainer_arguments import check_places, check_trial, initial_model
from clip_po.training.activation_checkpointing import NoInputGradientsCallback
from clip_po.training.checkpoints import (
    CheckpointCallback,
    check_best_metric,
    checkpoint_folder,
    checkpoint_format,
    saving,
    whole_checkpoint,
)
from clip_po.training.dropout import disable_dropout
from clip_po.training.learning_rates import TowerRatesCallback, set_learning_rates
from clip_po.training.logit_scale import LogitScaleCallback
from clip_po.training.nan_guard import NanGuardCallback
from clip_po.training.output_folder import OverwriteCallback, check_unused
from clip_po.training.random_state import unchanged_random_state
from clip_po.training.reference_sync import ReferenceSyncCallback
from clip_po.training.resuming import check_resume
from clip_po.training.run_identity import RunIdentityCallback
from clip_po.training.sharding import allow_sharding
from clip_po.training.stream_position import StreamPositionCallback
from clip_po.unpaired import mismatched_kl


class ContrastivePOTrainer(Trainer):
    """Trainer for preference optimization of contrastive vision-language models.

    The softmax over candidate texts is a policy. DPO, IPO or KTO moves it towards the chosen texts, and
    KL(reference || policy) on regularization images keeps the rest.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The policy: a two-tower model, such as CLIP or SigLIP. A name
            or folder is loaded in float32, and an object in 16 bits is converted.
        ref_model (`PreTrainedModel`, *optional*): The reference policy. Defaults to the policy as training starts:
            without adapters if `peft_config` is given, with its adapters if `model` is a `PeftModel`.
        args (`ContrastivePOConfig`, *optional*): Settings. The defaults write to `<model>-PO`.
        data_collator (`Callable`, *optional*): Defaults to `DataCollatorForContrastivePreference`.
        train_dataset (`datasets.Dataset`, `TypographicPreferences` or a stream): Preferences in a format of
            `clip_po.data.formats`. A `datasets.IterableDataset` or `TypographicStream` is read as it comes and needs
            `max_steps`.
        eval_dataset (`datasets.Dataset`, `TypographicPreferences`, or a `dict` of them, *optional*): Preferences to
            evaluate on.
        processing_class (`ProcessorMixin`, *optional*): Defaults to the processor of the checkpoint that the model was
            loaded from.
        compute_metrics (`Callable`, *optional*): Takes an `EvalPrediction` of one batch (log-probabilities [B, N] and
            positions of the chosen texts [B]) and `compute_result`. Needs `batch_eval_metrics=True`.
        callbacks, optimizers: As in `Trainer`. `optimizers` takes precedence over the arguments.
        peft_config (`PeftConfig`, *optional*): Adapters to add to a plain model.
        model_init (`Callable`, *optional*): Returns the initial model, instead of `model`. It is called at the start
            of each training, so that `hyperparameter_search` starts each trial from the same model.
        reg_dataset (`datasets.Dataset`, *optional*): Regularization images in a column `image`, of any kind and
            without labels. Defaults to the `clean_image` of each preference. With `reg_share`, training uses them too.
        candidate_texts (`list[str]`, *optional*): The texts among which the policy of every row chooses. By default
            each row names its own.

    Raises:
        ValueError, TypeError: If arguments do not fit together. The message says what, where and what to do.

    Source: Afzali et al. 2025, arXiv 2411.08923.
    """

    args: ContrastivePOConfig
    model: PreTrainedModel | PeftModel
    processing_class: ProcessorMixin
    train_dataset: PreferencePairs | StreamedPairs | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: PreTrainedModel | None = None,
        args: ContrastivePOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction, bool], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        reg_dataset: Dataset | None = None,
        candidate_texts: Sequence[str] | None = None,
        model_init: Callable[..., PreTrainedModel | PeftModel] | None = None,
    ) -> None:
        check_places(model, ref_model, data_collator, model_init, optimizers)
        args = args if args is not None else ContrastivePOConfig(default_output_dir(model or "clip"))
        check_args(args, compute_metrics, candidate_texts)
        check_best_metric(args, eval_dataset)
        self.reg_dataset = reg_dataset
        self._references = ref_model, peft_config
        self.reg_texts = regularization_texts(train_dataset, candidate_texts, args)
        if model_init is not None:
            model = initial_model(model_init, args.seed)
        encoder = self.load_encoder(model, ref_model, args, peft_config)
        processor = processing_class or load_processor(encoder, args)
        models = (encoder, ref_model) if ref_model is not None else (encoder,)
        for checked in models:
            check_processor(processor, checked)
        if args.disable_dropout:
            disable_dropout(*models)
        module = self.module_to_train(encoder)
        if optimizers[0] is not None:
            check_optimizer(optimizers[0], module, args)
        self.candidates = CandidateTexts(candidate_texts, TextTokens.of(processor, encoder))
        with creating_repository(self, args):
            super().__init__(
                model=module,
                args=args,
                data_collator=data_collator or DataCollatorForContrastivePreference(processor, self.candidates),
                train_dataset=None if train_dataset is None else self.training_rows(train_dataset, args),
                eval_dataset=self.evaluation_rows(eval_dataset, args),
                processing_class=processor,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        # compute_loss divides by the weights of the whole accumulated global batch itself.
        self.model_accepts_loss_kwargs = True
        # Gradients live in DDP's buckets instead of beside them, which saves one copy of all that trains.
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if model_init is not None:  # Trainer accepts it only without a model
            self.model_init = functools.partial(self.renew_model, model_init)
        self._use_encoder(encoder)
        if self.checkpoint_kind != "model":
            check_not_base(self.encoder.config.name_or_path, str(args.output_dir), args.hub_model_id)
        self.training_means, self.evaluation_means = RunningMeans(), RunningMeans()
        self.skipped_in_training, self.skipped_in_evaluation = SkippedRows(), SkippedRows()
        self._stream_position, self._checkpoints = StreamPositionCallback(), CheckpointCallback(self)
        self._nan_guard, self._identity = NanGuardCallback(self), RunIdentityCallback(self)
        self._tower_rates = TowerRatesCallback()
        watched = (self._nan_guard, self._tower_rates, self._stream_position)
        watching = (NoInputGradientsCallback(), LogitScaleCallback(), *watched)
        following = [ReferenceSyncCallback(self)] if args.sync_ref_model else []
        for callback in (*watching, OverwriteCallback(), *following, self._identity, self._checkpoints):
            self.add_callback(callback)

    def _use_encoder(self, encoder: PreTrainedModel | PeftModel) -> None:
        """Build policy and reference of a model, which `self.model` holds or is computed from."""
        ref_model, peft_config = self._references
        self.encoder: PreTrainedModel = dual_encoder(encoder).to(self.accelerator.device)
        if self.is_fsdp_enabled:
            allow_sharding(self.encoder)
        self.reference = self.build_reference(encoder, ref_model, peft_config)
        # A frozen vision tower gives policy and reference the same image embeddings.
        self.shares_image_embeds = ref_model is None and not tower_trains(self.encoder, "vision")
        self.policy = self.build_policy(encoder, ref_model)

    def renew_model(self, model_init: Callable[..., Any], trial: Any = None) -> nn.Module:
        """Make a new model by `model_init`, with the reference policy that belongs to it.

        `Trainer` calls this method at the start of each training, so that each trial of a hyperparameter search starts
        from the initial model.

        Args:
            model_init: As in the trainer.
            trial: The trial of a hyperparameter search, which `model_init` gets if it takes an argument.

        Returns:
            The module to train.

        Raises:
            ValueError, TypeError: As for `load_encoder`.
        """
        ref_model, peft_config = self._references
        model = initial_model(model_init, self.args.seed, trial)
        encoder = self.load_encoder(model, ref_model, self.args, peft_config)
        if self.args.disable_dropout:
            disable_dropout(encoder)
        self.model = self.module_to_train(encoder)
        self._use_encoder(encoder)
        for pairs in (self.train_dataset, *_each(self.eval_dataset)):
            if isinstance(pairs, PreferencePairs):
                pairs.attach_reference({})  # the embeddings are those of the model before
        return self.model

    @property
    def loss_settings(self) -> LossSettings:
        """The settings of the losses, as the arguments are now: a hyperparameter search sets them for each trial."""
        return self.args.loss_settings

    # ---- Steps of __init__, for subclasses to replace --------------------------------------------------------

    def load_encoder(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        args: ContrastivePOConfig,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | PeftModel:
        """Load the dual encoder with its adapters, and freeze what does not train.

        Args:
            model: As in the trainer.
            ref_model: As in the trainer.
            args: The checked configuration.
            peft_config: As in the trainer.

        Returns:
            The model, with adapters a `PeftModel`, before it is moved to the device of the trainer.

        Raises:
            ValueError, TypeError, OSError: As for `load_policy`.
        """
        encoder = load_policy(model, ref_model, args, peft_config)
        choose_trainable(encoder, args)
        return encoder

    def module_to_train(self, encoder: PreTrainedModel | PeftModel) -> nn.Module:
        """Return the module that `Trainer` trains and saves: the dual encoder itself.

        Args:
            encoder: From `load_encoder`.

        Returns:
            The same object.
        """
        return encoder

    def training_rows(self, dataset: Any, args: ContrastivePOConfig) -> PreferencePairs | StreamedPairs:
        """Check the training data set, and pair its rows with their regularization images.

        Args:
            dataset: `train_dataset` of the trainer, not None.
            args: The configuration. A stream also needs its `max_steps`.

        Returns:
            `StreamedPairs` of a stream, else `PreferencePairs`.

        Raises:
            ValueError, TypeError: If the data can't be used; the message names row and column.
        """
        check = checked_stream if is_stream(dataset) else checked_pairs
        rows = mixed_preferences(dataset, self.reg_dataset, args.reg_share) if args.reg_share else dataset
        pairs = check(rows, self._paired_images(args), self.candidates, args, "train_dataset")
        warn_of_few_texts(dataset, self.candidates.texts, args, "train_dataset")
        warn_of_idle_data(dataset, self.reg_dataset, self.candidates.texts, args)
        return pairs

    def evaluation_rows(self, dataset: Any, args: ContrastivePOConfig, name: str = "eval_dataset") -> Any:
        """Check an evaluation data set, or several by name.

        Args:
            dataset: `eval_dataset` of the trainer: preferences, a dictionary of them, or None. No stream.
            args: The configuration.
            name: Name of the data set in messages.

        Returns:
            `EvaluationPairs`, or a dictionary of them by the same names; None and `PreferencePairs` unchanged.

        Raises:
            ValueError, TypeError: If the data can't be used; the message names row and column.
        """
        if isinstance(dataset, (dict, DatasetDict)):
            return {key: self.evaluation_rows(rows, args, f"{name}[{key!r}]") for key, rows in dataset.items()}
        return dataset if dataset is None else self._evaluation_pairs(dataset, args, name)

    def _evaluation_pairs(self, dataset: Any, args: ContrastivePOConfig, name: str) -> PreferencePairs:
        if isinstance(dataset, PreferencePairs):
            return dataset
        return checked_pairs(dataset, self._paired_images(args), self.candidates, args, name, EvaluationPairs)

    def _paired_images(self, args: ContrastivePOConfig) -> Dataset | None:
        """Return the images of which one goes with each preference; None for its own clean image."""
        return None if args.reg_share else self.reg_dataset

    def build_reference(
        self, encoder: nn.Module, ref_model: nn.Module | None, peft_config: PeftConfig | None
    ) -> ReferencePolicy:
        """Build the reference policy from `ref_model`, or from the policy as it is now.

        Args:
            encoder: From `load_encoder`. This trainer copies `self.model`, which is the same object.
            ref_model: The reference policy, which is frozen and moved to the device of the trainer; None for the
                initial policy.
            peft_config: Adapters that were just added, which the reference leaves out; None for no new ones.

        Returns:
            The reference policy. It embeds the images of preferences only if a loss compares with the reference on
            them.
        """
        if ref_model is None:
            model = initial_policy(self.model, peft_config)
        else:
            model = ref_model.requires_grad_(False).eval().to(self.accelerator.device)
        # If the text tower trains in bfloat16, both sides of the log-ratios must have the same rounding error.
        encode = encode_texts_autocast if tower_trains(encoder, "text") else encode_texts
        texts = CachedTextEmbeddings(model, self.processing_class, encode)
        compares = REFERENCED & set(self.args.loss_type) and not self.args.reference_free
        images = ROW_IMAGES if compares else ROW_IMAGES[1:]
        return ReferencePolicy(
            model, self.processing_class, self.candidates, texts, images, self.reg_texts, self.args.policy
        )

    def build_policy(self, encoder: nn.Module, ref_model: nn.Module | None) -> Any:
        """Build the policy. A frozen text tower is shared with the reference, whose copy is never sharded.

        Args:
            encoder: From `load_encoder`, on the device of the trainer.
            ref_model: As in the trainer; None if the reference is a copy of `encoder`.

        Returns:
            A callable (model, encoder, batch) -> `CandidateLogps`: a `Policy`.
        """
        texts: CachedTextEmbeddings | None = self.reference.text_embeddings
        if tower_trains(encoder, "text"):
            texts = None
        elif ref_model is not None:
            own = frozen_copy(encoder) if self.is_fsdp_enabled else encoder
            texts = CachedTextEmbeddings(own, self.processing_class)
        chunk_size = self.args.tower_chunk_size
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile
        check_chunks(dual_encoder(encoder), chunk_size, wrapped=wrapped)
        return Policy(self.processing_class, self.candidates, texts, self.reg_texts, chunk_size, self.args.policy)

    # ---- The method ------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the loss of the accumulated global batch, of which `inputs` is a part.

            loss = sum_i weight_i * preference_loss_i / rows + reg_weight * sum_j regularization_j / reg_rows

        The regularization is KL_j(reference || policy), unless `reg_type` names another.

        `rows` and `reg_rows` are the numbers of preferences and of regularization images whose image can be read.
        Padding does not count. A row of weight 0 does, so that row weights shift the balance with the KL.

        Args:
            model: The model as wrapped for training.
            inputs: A batch of `DataCollatorForContrastivePreference`.
            return_outputs: Also return the log-probabilities over the candidates.
            num_items_in_batch: Tensor[3], the `row_totals` of the accumulated global batch, from `get_batch_samples`;
                None for those of `inputs` alone.

        Returns:
            The loss, Tensor[], scaled so that the formula is its sum over accumulation steps, averaged over processes;
            with `return_outputs` also {"logps": Tensor[B, N], "chosen": Tensor[B]}.

        Source: Afzali et al. 2025, arXiv 2411.08923.
        """
        inputs = self._without_metadata(inputs)
        with self.accelerator.autocast():  # accelerate applies it to the forward of the model alone
            inputs = self.reference.embedded(inputs) if self.shares_image_embeds else inputs
            reference = self.reference(inputs)
        policy = self.policy(model, self.encoder, inputs)
        logps = preference_logps(policy, reference, inputs, self._mismatched_kl(policy, reference, inputs))
        regularization = regularization_loss(policy, reference, self.args.reg_type)
        kl = regularization if self.args.reg_type == "kl" else regularization_kl(policy, reference)
        totals = row_totals(inputs) if num_items_in_batch is None else num_items_in_batch
        rows, reg_rows = totals[:2].clamp(min=FEWEST_ROWS)
        has_reg_image = inputs["reg_row_weight"]

        losses = preference_loss(
            logps, self.args.loss_type, self.args.weights, self.loss_settings, self._reference_point(kl, has_reg_image)
        )
        losses = inputs["weight"] * losses
        loss = losses.sum() / rows + self.args.reg_weight * (has_reg_image * regularization).sum() / reg_rows

        # A step of nothing but rows of weight 0 says nothing about the preference loss.
        measured = inputs["counted"] if num_items_in_batch is None else inputs["counted"] * (totals[2] > 0)
        regularized = {"kl": kl, "loss/regularization": self.args.reg_weight * regularization}
        self._add_to_means(logps, losses, regularized, inputs, measured)
        if num_items_in_batch is not None:  # the gradients of processes are averaged, but these sums must be added
            loss = loss * self.accelerator.num_processes
        return (loss, {"logps": policy.preference, "chosen": inputs["chosen"]}) if return_outputs else loss

    def _reference_point(self, kl: Tensor, weight: Tensor) -> Tensor | None:
        """Return KTO's z0: the KL of the micro-batch of all processes, because it is inside a sigmoid."""
        if not ANCHORED & set(self.args.loss_type):
            return None
        sums = self._sum_over_processes(torch.stack([(weight * kl.detach()).sum(), weight.sum()]))
        return sums[0] / sums[1].clamp(min=FEWEST_ROWS)

    def _mismatched_kl(
        self, policy: CandidateLogps, reference: CandidateLogps, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the reference point of `kto`, of the micro-batch of all processes."""
        if "kto" not in self.args.loss_type:
            return None
        logratios = (policy.preference - reference.preference).detach()
        return mismatched_kl(logratios, inputs, self.candidates.are_shared(inputs), self._sum_over_processes)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the batches of an optimizer step, and the numbers of their rows over all processes.

        Args:
            epoch_iterator: Batches of this process.
            num_batches: Number of batches to take. Fewer are returned at the end of an epoch.
            device: Device of the numbers.

        Returns:
            The batches, and their `row_totals`, Tensor[3]. No batches and None at the end of the epoch, or if the run
            has no step left.

        Raises:
            ValueError: If the processes read different rows from a stream.
        """
        if self.state.global_step >= self.state.max_steps:  # Trainer resumes a finished run with one step too many
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if isinstance(self.train_dataset, StreamedPairs):
            self._stream_position.follow(batches[-1].pop("stream_mark"), self.accelerator)
        return batches, self._sum_over_processes(row_totals(*batches).to(device))

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _without_metadata(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Count the skipped rows of a batch, and let its rows share their candidates if the arguments say so."""
        skipped = self.skipped_in_training if self.model.training else self.skipped_in_evaluation
        skipped.add(inputs.pop("skipped", ()))
        if not self.args.in_batch_candidates:
            return inputs
        return in_batch_candidates(inputs, self.candidates.identity)

    # ---- Training --------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, but resume only from whole checkpoints of this run.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True for the last whole one in `output_dir`; None or False
                for a new run.
            *args: As in `Trainer.train`.
            **kwargs: As in `Trainer.train`.

        Returns:
            As from `Trainer.train`.

        Raises:
            ValueError, OSError: If the checkpoint is not whole, damaged, unsafe to read, or of a run with other data,
                texts, reference or settings, unless `ignore_run_differences` says so; if
                `output_dir` holds checkpoints of an earlier run, unless `overwrite_output_dir` says so; or if
                there is no `train_dataset`, a row of a stream can't be used, or all rows were skipped.
            UnreadableImage: If an image can't be read and `on_bad_image` is "raise".
            FloatingPointError: If the loss or a gradient is not finite.
            ChildProcessError: If a worker process that loads data is killed.
            SavingError: If a checkpoint can't be written.
        """
        check_trial(args[0] if args else kwargs.get("trial"), self.args)
        folder = whole_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        check_unused(self.args, folder)
        self.args.resume_from_checkpoint = folder
        self.training_means, self.skipped_in_training = RunningMeans(), SkippedRows()
        self._stream_position.mark = None
        if isinstance(self.train_dataset, StreamedPairs):
            resumes = folder is not None and not self.args.ignore_data_skip
            self.train_dataset.start_from(StreamMark.load(str(folder)) if resumes else None)
        if folder is not None:
            check_resume(self, folder)
            self._identity.check(folder)
        try:
            with killed_workers_explained(self.args.dataloader_num_workers):
                return super().train(folder, *args, **kwargs)
        finally:
            self._checkpoints.release(self.args)

    def replace_model(self, model: PreTrainedModel) -> None:
        """Replace the trained model, for instance by an interpolation, so that it is evaluated and saved instead.

        Args:
            model: A model on the device of the trainer, with towers of its own. The reference does not change, and
                an optimizer keeps the parameters of the old model.
        """
        self.model = self.model_wrapped = self.encoder = model
        self.shares_image_embeds = False  # those of the reference belong to the vision tower of the old model
        if self.policy.text_embeddings is not None:
            self.policy.text_embeddings = CachedTextEmbeddings(model, self.processing_class)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Return the optimizer and its arguments as `Trainer` does, and torch's Adamax for `optim="adamax"`.

        Args:
            args: The configuration.
            model: As in `Trainer`. Adamax does not read it.

        Returns:
            The class, and its keyword arguments without the parameters.

        Raises:
            ValueError: As in `Trainer`, if it does not know the optimizer.
        """
        if args.optim == ADAMAX:
            betas = (args.adam_beta1, args.adam_beta2)
            return torch.optim.Adamax, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer` does, with the learning rates of towers and blocks if there are several.

        Args:
            model: The module whose parameters it trains; None for `self.model`.

        Returns:
            The optimizer, or the one that there is already.
        """
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.args.learning_rates:
            set_learning_rates(optimizer, self.model if model is None else model, self.args)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: all but biases, normalizations and `WITHOUT_DECAY`.

        Args:
            model: The module that trains.

        Returns:
            Names in `model.named_parameters()`. The matrices of a `ConceptTransform` have no decay either.
        """
        return [n for n in super().get_decay_parameter_names(model) if not any(part in n for part in WITHOUT_DECAY)]

    # ---- Metrics and evaluation ------------------------------------------------------------------------------

    @property
    def _has_rewards(self) -> bool:
        return bool(readers("beta") & set(self.args.loss_type))  # a reward is beta times a log-ratio

    def _add_to_means(
        self,
        logps: PreferenceLogps,
        losses: Tensor,
        regularized: Mapping[str, Tensor],
        inputs: Mapping[str, Any],
        measured: Tensor,
    ) -> None:
        metrics = {
            **preference_metrics(logps, self.args.beta, inputs["weight"]),
            "loss/preference": (losses.detach(), measured),
            **{name: (value.detach(), inputs["reg_row_weight"]) for name, value in regularized.items()},
        }
        if not self._has_rewards:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
        (self.training_means if self.model.training else self.evaluation_means).add(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means over rows, and the number of skipped rows, since the last log.

        Args:
            logs: Values by name, as in `Trainer`. "loss" marks the log of training steps and "train_loss" that of the
                end of training: every process must call the method with these. Not changed.
            start_time: As in `Trainer`.

        Raises:
            ValueError: If all rows so far were skipped. The check starts once there were as many as the data set has,
                and runs at the end of training.
        """
        if "loss" in logs:  # Trainer's log of training steps, which every process writes
            means = self.training_means.pop(self._sum_over_processes)
            logs = {**logs, **means, "loss": loss_of_parts(means)}
            logs |= self._tower_rates.rates
            logs |= self._count_skipped(self.skipped_in_training, fewest=len(self.train_dataset or ()))
        if "train_loss" in logs:  # Trainer's log at the end of training
            logs = {**logs, **self._count_skipped(self.skipped_in_training, fewest=1)}
        super().log(logs, start_time)
        if "train_loss" in logs:  # next, Trainer would delete the last checkpoint if another one is the best
            self._checkpoints.withhold(self.args)

    def _count_skipped(self, rows: SkippedRows, fewest: int) -> dict[str, float]:
        if self.args.on_bad_image == "raise":
            return {}
        return {"skipped_rows": rows.pop(self._sum_over_processes, self.accelerator.device, fewest)}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor | None, Tensor | None]:
        """Evaluate a batch. Its rows go into running means; nothing else is kept unless metrics ask for it.

        Args:
            model: The model as wrapped for evaluation.
            inputs: A batch of `DataCollatorForContrastivePreference`, on any device.
            prediction_loss_only: Return None three times.
            ignore_keys: Not used.

        Returns:
            No loss, and the log-probabilities [B, N] and positions of the chosen texts [B] if they are asked for.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (None, None, None) if prediction_loss_only else (None, outputs["logps"], outputs["chosen"])

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate. Every row counts once, for any number of processes and any size of the last batch.

        Args:
            dataloader: From `get_eval_dataloader`.
            description: Heading in the log.
            prediction_loss_only: As in `Trainer`.
            ignore_keys: Not used.
            metric_key_prefix: Prefix of the metrics, before "_".

        Returns:
            As from `Trainer`. The metrics also hold means over rows: those of `preference_metrics`, `kl`,
            `loss/regularization`, and `loss`, the sum of the two parts of the loss.

        Raises:
            ValueError: If all rows were skipped.
        """
        self.evaluation_means, self.skipped_in_evaluation = RunningMeans(), SkippedRows()
        workers = self.args.dataloader_num_workers
        with unchanged_random_state(self.accelerator.device), killed_workers_explained(workers):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        means = self.evaluation_means.pop(self._sum_over_processes)
        means["loss"] = loss_of_parts(means)
        means |= self._count_skipped(self.skipped_in_evaluation, fewest=1)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # ---- Data ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load rows in the order of `EpochSampler`, with embeddings of fixed images if computing them once pays.

        Returns:
            The batches of this process.

        Raises:
            ValueError: If there is no `train_dataset`, or as for `embed_images`.
        """
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset; pass it to the trainer.")
        global_batch = self._train_batch_size * self.accelerator.num_processes
        if isinstance(self.train_dataset, StreamedPairs):
            self.train_dataset.multiple = global_batch
            return self._load(self.train_dataset, self._train_batch_size, seed=None, drop_last=False)
        rows = len(self.train_dataset) * self.args.num_train_epochs
        if self.args.max_steps > 0:
            rows = self.args.max_steps * self.args.gradient_accumulation_steps * global_batch
        self.embed_images(self.train_dataset, pays=rows > len(self.train_dataset))
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.args.train_sampling_strategy == "sequential":
            seed = None
        return self._load(self.train_dataset, self._train_batch_size, seed, self.args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Load rows in the order of the data set. A `str` names one of several evaluation data sets.

        Args:
            eval_dataset: Preferences; the name of one of several evaluation data sets; or None for `eval_dataset` of
                the trainer.

        Returns:
            The batches of this process.

        Raises:
            ValueError: If there is no data set, its rows can't be used, or as for `embed_images`.
            TypeError: If it is a stream, or not a data set.
            KeyError: If no evaluation data set has this name.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset; pass it to the trainer or to evaluate().")
        pairs = self._evaluation_pairs(dataset, self.args, "eval_dataset")
        self.embed_images(pairs, pays=False)  # embeddings of every row are kept only if they are asked for
        return self._load(pairs, self.args.eval_batch_size, seed=None, drop_last=False)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Load rows as `get_eval_dataloader` does.

        Args:
            test_dataset: As for `get_eval_dataloader`.

        Returns:
            The batches of this process.

        Raises:
            ValueError, TypeError, KeyError: As for `get_eval_dataloader`.
        """
        return self.get_eval_dataloader(test_dataset)

    def embed_images(self, pairs: PreferencePairs, pays: bool) -> None:
        """Embed fixed images with the reference once, if the arguments say so or, by default, if it pays.

        It always pays if the policy has the same embeddings. Rows then come without images.

        Args:
            pairs: The rows, which get the embeddings.
            pays: Whether it pays. Only read if `precompute_ref_log_probs` is None.

        Raises:
            UnreadableImage: If an image can't be read and `on_bad_image` is "raise".
            ValueError: If none of the images of a name can be read.
            OSError: If `embeddings_cache` can't be written to.
        """
        wanted = self.args.precompute_ref_log_probs
        pays = pays and not self.args.sync_ref_model  # embeddings of a moving reference would soon be stale
        pairs.without_images = self.shares_image_embeds
        if not (pays or self.shares_image_embeds if wanted is None else wanted):
            return
        cache = EmbeddingCache(self.args.embeddings_cache) if self.args.embeddings_cache else None
        kept, workers = unchanged_random_state(self.accelerator.device), self.args.dataloader_num_workers
        with kept, killed_workers_explained(workers), self.accelerator.autocast():
            embed_fixed_images(
                self.reference,
                pairs,
                self.processing_class,
                self.accelerator,
                self.args.eval_batch_size,
                self.args.dataloader_num_workers,
                bool(self.args.disable_tqdm),
                cache,
                ROW_IMAGES if self.shares_image_embeds else self.reference.images,
            )

    def _load(self, dataset: Any, batch_size: int, seed: int | None, drop_last: bool) -> DataLoader[Any]:
        # A data set smaller than a batch is one small batch, not one that is padded with rows of weight 0.
        batch_size = min(batch_size, -(-len(dataset) // self.accelerator.num_processes))
        sampler = EpochSampler(len(dataset), batch_size * self.accelerator.num_processes, seed, drop_last)
        return row_loader(dataset, sampler, batch_size, self.data_collator, self.args, self.accelerator)

    # ---- Saving ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint. It counts once `CheckpointCallback` has marked it."""
        if self._checkpoints.is_saved(self.state):
            return
        self._nan_guard.check_weights()
        with self._checkpoints.writing(self.args, self.state):
            super()._save_checkpoint(model, trial)
        if not self.control.should_save:  # a signal called this method, not the training loop, which calls on_save
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save model, processor and arguments, without the pickle in which `Trainer._save` keeps the Hub token."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            settings = {**self.args.to_dict(), **self._checkpoints.withheld}
            with saving(str(folder), str(self.args.output_dir)):
                written_as = checkpoint_format(folder, model)
                save_pretrained(str(folder), model, self.processing_class, settings, state_dict, **written_as)
                # A checkpoint starts empty, and Trainer resumes a transformation from model.safetensors.
                if Path(folder) != checkpoint_folder(self.args, self.state):
                    remove_stale_files(folder, self.checkpoint_kind)

    @property
    def checkpoint_kind(self) -> CheckpointKind:
        """What checkpoints hold, for the model card."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return "adapter" if isinstance(model, PeftModel) else "model"

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model and push the output folder to the Hub, repeated while the Hub is busy.

        Args:
            *args: As in `Trainer.push_to_hub`.
            **kwargs: As in `Trainer.push_to_hub`.

        Returns:
            The commit; with `blocking=False` a future of it; None in every process but the first.

        Raises:
            HubError: If the Hub refuses, or stays busy or out of reach.
        """
        return push_model(self, *args, **kwargs)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card into the output folder.

        Args:
            model_name: Name of the model; defaults to the name of the folder.
            **kwargs: `tags` to add to the metadata. Other arguments of `Trainer.create_model_card` are not used.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        drift = TrainingDrift.logged(self.state.log_history)
        said = None if drift is None else drift.describe()
        card = card_of_run(self, model_name or folder.name, self.checkpoint_kind, measured_table(folder), said)
        tags = kwargs.get("tags") or []
        card.data.tags = [*card.data.tags, *([tags] if isinstance(tags, str) else tags)]
        card.save(folder / CARD_FILE)


def _each(datasets: Any) -> list[Any]:
    """Return one evaluation dataset, or several by name, as a list."""
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]
