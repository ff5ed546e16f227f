"""Configuration of the trainer, and the presets of the paper."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.utils import logging

from clip_po.hub.redaction import redacted
from clip_po.loss_arguments import LOSS_NUMBERS, LossArguments
from clip_po.losses import LABEL_FREE, REFERENCED, TARGETED
from clip_po.tower_arguments import TowerArguments
from clip_po.validation import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STEPS,
    Allowed,
    check_candidates,
    check_number,
    check_writable,
)

logger = logging.get_logger(__name__)

PAPER_BATCH_SIZE = 512

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"], "beta": 1.0, "reg_weight": 1.0},
    "ipo": {"loss_type": ["ipo"], "beta": 0.01, "reg_weight": 0.01},
    "kto": {"loss_type": ["kto_pair"], "beta": 1.5, "reg_weight": 0.01},
}
"""Settings of the paper by method (Afzali et al. 2025, arXiv 2411.08923). `PRESET_TRAINING` holds what they share."""

PRESET_TRAINING: Mapping[str, Any] = {
    "optim": "adamax",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "num_train_epochs": 3,
}

ADAMAX = "adamax"

SHARE = Allowed("lie in [0, 1)", lambda number: 0 <= number < 1)

NUMBERS: Mapping[str, Allowed] = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": STEPS,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": COUNT_OR_NONE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "seed": SEED,
    "reg_weight": NOT_NEGATIVE,
    "reg_share": SHARE,
    **LOSS_NUMBERS,
}
"""Values that numeric arguments may have. Trainer accepts any value and fails, or learns nothing, later."""

STEPPED: Mapping[str, str] = {"logging_steps": "logging_strategy", "save_steps": "save_strategy"}
"""Arguments that are only used with the strategy "steps", and the argument that sets the strategy."""

REG_TYPES = ("kl", "kl_open", "embedding")
"""What holds the policy to the reference on ordinary images: see `reg_type` of `ContrastivePOConfig`."""

BOOLEAN_ARGUMENTS = (
    "reference_free",
    "sync_ref_model",
    "in_batch_candidates",
    "train_vision_model",
    "train_text_model",
    "train_logit_scale",
    "disable_dropout",
    "ignore_run_differences",
)
"""Arguments that must be True or False. Any string, even "false", would count as True."""


def preset(name: str) -> dict[str, Any]:
    """Return the settings of the paper for a method, without the batch size.

    Args:
        name: "dpo", "ipo" or "kto".

    Returns:
        Arguments of `ContrastivePOConfig` by name: loss, beta and lambda of the method, and the training that all
        methods share.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}.")
    return copy.deepcopy({**PRESET_TRAINING, **PRESETS[name]})


def preset_batch_size(gradient_accumulation_steps: int) -> int:
    """Return the batch size of a process: 512, the batch of the paper, divided by processes and accumulation steps.

    Args:
        gradient_accumulation_steps: Batches of a process in an optimizer step, >= 1.

    Returns:
        The batch size, rounded down, at least 1. The number of processes is the environment variable `WORLD_SIZE`, or
        1.

    Raises:
        ValueError, TypeError: If `gradient_accumulation_steps` is not a whole number >= 1.
    """
    check_number("gradient_accumulation_steps", gradient_accumulation_steps, COUNT)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, PAPER_BATCH_SIZE // (processes * gradient_accumulation_steps))


@dataclass
class ContrastivePOConfig(TowerArguments, LossArguments, TrainingArguments):
    """Configuration of the [`ContrastivePOTrainer`].

    It has the arguments below, those of [`LossArguments`] and [`TowerArguments`], and those of
    [`~transformers.TrainingArguments`].

    Args:
        > The regularization and the candidates (`optim` also accepts `"adamax"`)

        reg_weight (`float`, defaults to `1.0`): Weight of the regularization on ordinary images, >= 0; lambda in the
            paper. 0 leaves the images out.
        reg_type (`str`, defaults to `"kl"`): What the regularization measures. `"kl"` is KL(reference || policy) over
            the candidate texts, as in the paper. `"kl_open"` is the same KL over `reg_candidate_texts`. `"embedding"`
            is 1 - cosine of the embeddings of policy and reference, which belongs to no task and preserves the answers
            to all texts; it needs ten to forty times the weight. The last two need a frozen text tower.
        reg_candidate_texts (`list[str]`, *optional*): The texts of `reg_type="kl_open"`. Defaults to the prompts of
            173 everyday nouns that come with the package and the candidate texts of the task.
        reg_share (`float`, defaults to `0.0`): Share of the training rows, 0 to below 1, that show generic images:
            random crops and collages of the images of `reg_dataset`, or without one of the training images. They get
            attack words too. Their targets are the reference's answers on the clean image, so that they need no
            labels. Each row is then regularized on its own clean image. It needs `TypographicPreferences` and a loss
            that needs no labels. With 0, one image of `reg_dataset` goes with each preference and is only regularized.
        in_batch_candidates (`bool`, defaults to `False`): Let the policy choose among all texts of the global batch
            instead of each row's own, if no `candidate_texts` are given. With gradient accumulation, these are the
            texts of one micro-batch of all processes, including the rows that pad the last batch.
        logging_nan_inf_filter (`bool`, defaults to `False`): Trainer's filter, which logs a loss of nan as the mean of
            other losses and asks the device after each batch. Training stops before a step on such a loss anyway.

        > The output folder

        overwrite_output_dir (`bool`, defaults to `False`): Replace what an earlier run left in `output_dir`. Training
            then starts by deleting that run's checkpoints. By default, a new run in a folder with checkpoints raises.
        ignore_run_differences (`bool`, defaults to `False`): Resume from a checkpoint although data, candidate texts,
            reference or settings differ from those of the run that wrote it, and log the differences. By default, they
            raise. The optimizer and its schedule keep the values in the checkpoint. A longer run (`num_train_epochs`,
            `max_steps`) is no difference.

        > The model

        disable_dropout (`bool`, defaults to `True`): Set every dropout probability of the policy, the reference and
            their adapters to 0. The saved configuration of the model keeps its values.
        model_init_kwargs (`dict`, *optional*): Keyword arguments of `AutoModel.from_pretrained`, if the trainer gets
            the name of a model.
        base_model_id (`str`, *optional*): Hub id of the base model, for adapters and the model card, if the model was
            loaded from a folder.

        > The images

        on_bad_image (`str`, defaults to `"raise"`): What to do with an image that cannot be read. `"raise"` stops and
            names its row. `"skip"` gives everything that depends on it the weight 0, and logs count such rows as
            `skipped_rows`.

        > The reference

        precompute_ref_log_probs (`bool`, *optional*): Embed each fixed image with the reference once, before training.
            `None` does so if it pays: for fixed images that are used in more than one epoch. `True` always does, and
            raises for images that change. `False` never does.
        embeddings_cache (`str`, *optional*): Folder that keeps these embeddings between runs, by a fingerprint of
            everything that they depend on: weights and settings of the image tower, processor, precision, and images.
            It is only used if embeddings are precomputed: for a run of one epoch on fixed images, also set
            `precompute_ref_log_probs=True`.

    Raises:
        TypeError: If an argument has the wrong type. The message names it.
        ValueError: If an argument is out of range, unknown, or does not fit another one. The message names it.
    """

    # Arguments given as JSON on the command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    optim: str = field(
        default="adamw_torch",
        metadata={"help": "The optimizer: a name in transformers' OptimizerNames, or adamax, which the paper uses."},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, this share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log a loss of nan as the mean of other losses; training stops before such a step anyway."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace what an earlier run left in output_dir, checkpoints included; default: refuse."},
    )
    ignore_run_differences: bool = field(
        default=False,
        metadata={"help": "Resume although data or settings differ from the run of the checkpoint; default: refuse."},
    )
    reg_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the regularization on ordinary images, >= 0; lambda in the paper."},
    )
    reg_type: Literal["kl", "kl_open", "embedding"] = field(
        default="kl",
        metadata={
            "help": "Regularization: kl, KL(reference || policy) over the candidate texts, as in the paper; kl_open, "
            "over reg_candidate_texts; embedding, 1 - cosine of the image embeddings."
        },
    )
    reg_candidate_texts: list[str] | None = field(
        default=None, metadata={"help": "Texts of kl_open. Default: prompts of 173 everyday nouns and of the task."}
    )
    reg_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training rows, below 1, that show generic images with words: crops and collages of "
            "the images of reg_dataset, or without one of the training images."
        },
    )
    in_batch_candidates: bool = field(
        default=False, metadata={"help": "Make every text of the global batch a candidate of each of its rows."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout probability of policy, reference and adapters to 0."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of AutoModel.from_pretrained, as JSON."}
    )
    base_model_id: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model, for adapters and card, if it was loaded from a folder."},
    )
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "What to do with an unreadable image: raise, or skip its row and count it."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={"help": "Embed each fixed image with the reference once, before training; default: if it pays."},
    )

    embeddings_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the reference's embeddings of fixed images between runs."}
    )

    def __post_init__(self) -> None:
        """Check the arguments before anything is loaded."""
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check()
        # TrainingArguments does not know Adamax: let it check the other arguments with another optimizer.
        adamax = self.optim == ADAMAX
        if adamax:
            self.optim = "adamw_torch"
        super().__post_init__()
        if adamax:
            self.optim = ADAMAX

    def _check(self) -> None:
        self._check_losses()
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor!r} is Trainer's argument for classifiers. It "
                "has no effect here. Use label_smoothing for the conservative DPO loss."
            )
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True converts the model itself to 16 bits, so that it would be trained and saved with "
                    "rounded weights after an evaluation. Leave it out; with bf16=True, evaluations run in bfloat16."
                )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {self.train_sampling_strategy!r}: "
                "preferences have no lengths to group by."
            )
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {self.on_bad_image!r}.")
        for name, allowed in self._numbers().items():
            if (value := getattr(self, name)) is not None:  # clip-po train chooses some of them from the data later
                check_number(name, value, allowed)
        self._check_regularization()
        if self.data_seed is not None:
            check_number("data_seed", self.data_seed, SEED)
        for name in BOOLEAN_ARGUMENTS:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")
        self._check_towers()
        if self.precompute_ref_log_probs not in (None, True, False):
            raise TypeError(
                f"precompute_ref_log_probs must be True, False or None, got {self.precompute_ref_log_probs!r}."
            )
        for name in ("output_dir", "embeddings_cache"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or not str(value)):
                raise TypeError(f"{name} must be the path of a folder, got {value!r}. Choose where files are written.")
        self._check_read_by_a_loss()
        self._check_moving_reference()

    def _check_regularization(self) -> None:
        if self.reg_type not in REG_TYPES:
            raise ValueError(f"reg_type must be one of {list(REG_TYPES)}, got {self.reg_type!r}.")
        check_candidates(self.reg_candidate_texts, "reg_candidate_texts")
        if self.reg_candidate_texts is not None and self.reg_type != "kl_open":
            raise ValueError(
                f"reg_candidate_texts has no effect with reg_type={self.reg_type!r}. Set reg_type='kl_open', or leave "
                "it out."
            )
        if self.reg_type != "kl" and self.train_text_model:
            raise ValueError(
                f"reg_type={self.reg_type!r} compares with embeddings of texts or images that stay the same, but "
                "train_text_model=True changes those of all texts. Use reg_type='kl'."
            )
        needs_vision = [name for name in ("embedding_distillation",) if name in self.loss_type]
        needs_vision += ["reg_type='embedding'"] * (self.reg_type == "embedding")
        if needs_vision and not self.train_vision_model:
            raise ValueError(
                f"{' and '.join(needs_vision)} compares image embeddings, which train_vision_model=False does not "
                "change. Use the losses and reg_type='kl' of log-probabilities."
            )
        if self.reg_share > 0 and not LABEL_FREE & set(self.loss_type):
            raise ValueError(
                f"reg_share={self.reg_share!r} trains on images without labels, but none of loss_type="
                f"{self.loss_type!r} does without. Add one of {sorted(LABEL_FREE)}, or set reg_share=0: reg_dataset "
                "is then only regularized."
            )

    def _check_moving_reference(self) -> None:
        if not self.sync_ref_model:
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)!r} has no effect without sync_ref_model=True.")
            return
        compared = TARGETED if self.reference_free else TARGETED | REFERENCED
        if self.reg_weight == 0 and not compared & set(self.loss_type):
            raise ValueError(
                f"sync_ref_model=True has no effect with loss_type={self.loss_type!r} and reg_weight=0, which compare "
                "with no reference. Leave it out."
            )
        kept = [name for name in ("precompute_ref_log_probs", "embeddings_cache") if getattr(self, name)]
        if kept and self.train_vision_model:
            raise ValueError(
                "sync_ref_model=True moves the reference during training, so that embeddings computed before would be "
                f"those of another model. Leave {' and '.join(kept)} out."
            )

    def _numbers(self) -> dict[str, Allowed]:
        """Return the arguments in `NUMBERS` that are used, with their allowed values."""
        strategies = {name: getattr(self, strategy) for name, strategy in STEPPED.items()}
        idle = {name for name, strategy in strategies.items() if getattr(strategy, "value", strategy) != "steps"}
        return {name: allowed for name, allowed in NUMBERS.items() if name not in idle}

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments for trackers and files, without secrets at any depth.

        Returns:
            Values by name of the argument: enums by their values, and `<redacted>` for secrets.
        """
        return redacted(super().to_dict())

    def __str__(self) -> str:
        """Return the arguments for logs, without secrets at any depth."""
        shown = sorted(redacted({f.name: getattr(self, f.name) for f in fields(self)}).items())
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    __repr__ = __str__

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ContrastivePOConfig:
        """Return the settings of the paper: Adamax, learning rate 2e-5, cosine, 3 epochs, global batch size 512.

        Args:
            name: "dpo" (beta 1.0, lambda 1.0), "ipo" (0.01, 0.01) or "kto" (1.5, 0.01).
            **overrides: Arguments of the configuration, which take precedence over the preset.

        Returns:
            The configuration.

        Raises:
            ValueError: If there is no such preset.

        Source: Afzali et al. 2025, arXiv 2411.08923, experiments.
        """
        share = preset_batch_size(overrides.get("gradient_accumulation_steps", 1))
        return cls(**{**preset(name), "per_device_train_batch_size": share, **overrides})


def check_precision(args: TrainingArguments) -> None:
    """Raise if a device can't compute in the precision that was asked for.

    Args:
        args: The configuration. Its device is set up here if it was not before.

    Raises:
        ValueError: If float16 is asked for on a CPU, where accelerate computes in float32 instead.
    """
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError(
            "fp16=True (or ACCELERATE_MIXED_PRECISION=fp16) needs a GPU: on a CPU, training would run in float32. "
            "Leave it out, or set bf16=True."
        )


def check_args(args: Any, compute_metrics: Any, candidate_texts: Any = None) -> None:
    """Raise if a trainer cannot use a configuration, and set what depends on the machine.

    Args:
        args: The configuration.
        compute_metrics: As in the trainer.
        candidate_texts: As in the trainer.

    Raises:
        TypeError: If `args` is not a ContrastivePOConfig, or an argument has the wrong type.
        ValueError: If metrics come without `batch_eval_metrics`, candidates are given in two ways, float16 is asked
            for on a CPU, or an attribute was set to a value that is not allowed after the configuration was made.
        OSError: If `output_dir` is not writable.
    """
    if not isinstance(args, ContrastivePOConfig):
        raise TypeError(
            f"args must be a ContrastivePOConfig, got {type(args).__name__}. Make one with "
            "ContrastivePOConfig(output_dir=...), which takes the arguments of TrainingArguments too."
        )
    args._check()
    check_precision(args)
    for name, allowed in args._numbers().items():
        check_number(name, getattr(args, name), allowed)
    if args.should_save:
        check_writable(args.output_dir)
    if compute_metrics is not None and not args.batch_eval_metrics:
        raise ValueError(
            "compute_metrics needs batch_eval_metrics=True in ContrastivePOConfig: evaluation keeps no logits, so "
            "metrics are computed batch by batch. The function takes (eval_prediction, compute_result) and returns "
            "the metrics if compute_result is True."
        )
    check_candidates(candidate_texts)
    if args.in_batch_candidates and candidate_texts is not None:
        raise ValueError(
            "in_batch_candidates=True takes the candidates from each batch, but candidate_texts sets them for every "
            "row. Leave one of the two out."
        )
    if args.n_gpu > 1:
        logger.warning(
            f"One process trains on one of the {args.n_gpu} GPUs. To use all of them, run: accelerate launch "
            "your_script.py"
        )
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        # All unused parameters are frozen, so DDP does not have to search the graph at each step.
        args.ddp_find_unused_parameters = False
