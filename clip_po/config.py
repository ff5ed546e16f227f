"""Configuration of the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.utils import logging

from clip_po.hub.redaction import redacted
from clip_po.losses import LOSSES
from clip_po.validation import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STEPS,
    Allowed,
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
"""The paper's settings by method (Afzali et al. 2025, arXiv 2411.08923); the rest stands in `PRESET_TRAINING`."""

PRESET_TRAINING: Mapping[str, Any] = {
    "optim": "adamax",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "num_train_epochs": 3,
}

ADAMAX = "adamax"

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
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
}
"""What numbers may be that Trainer takes as they are, to fail or to learn nothing when they are used."""

STEPPED: Mapping[str, str] = {"logging_steps": "logging_strategy", "save_steps": "save_strategy"}
"""Numbers that count only under the strategy "steps"."""

SMOOTHING = Allowed("lie in [0, 0.5)", lambda number: 0 <= number < 0.5)

OWN_SWITCHES = ("reference_free", "in_batch_candidates", "train_text_model", "train_logit_scale")
"""Arguments that are True or False: any word, "false" too, would count as True."""


def preset(name: str) -> dict[str, Any]:
    """The paper's settings of a method, without the batch size.

    Args:
        name: "dpo", "ipo" or "kto".

    Raises:
        ValueError: No such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}.")
    return {**PRESET_TRAINING, **PRESETS[name]}


def preset_batch_size(gradient_accumulation_steps: int) -> int:
    """Rows a process and step, so that the paper's batch of 512 is shared among processes and accumulation steps."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, PAPER_BATCH_SIZE // (processes * gradient_accumulation_steps))


@dataclass
class ContrastivePOConfig(TrainingArguments):
    """Configuration of the [`ContrastivePOTrainer`], beyond those of [`~transformers.TrainingArguments`].

    Parameters:
        > The losses (and `optim`, which takes `"adamax"` besides the names that TrainingArguments knows)

        loss_type (`list[str]`, defaults to `["sigmoid"]`): `"sigmoid"` (DPO, and S-DPO with several rejected
            texts), `"ipo"`, `"kto_pair"`, `"sft"` (cross-entropy on the chosen text), `"distillation"` (the
            reference on the clean image as a soft target, without labels); several are summed.
        loss_weights (`list[float]`, *optional*): Weight of each loss type; 1 each where it is not given.
        beta (`float`, defaults to `0.1`): Strength of the pull to the reference policy, > 0; tau of IPO.
        label_smoothing (`float`, defaults to `0.0`): Probability in [0, 0.5) that a preference is the wrong way
            round (`sigmoid`).
        reference_free (`bool`, defaults to `False`): Take the reference's log-ratios of the preferences as 0; the
            regularization still compares with the reference.
        desirable_weight (`float`, defaults to `1.0`): Weight of chosen texts in `kto_pair`, >= 0.
        undesirable_weight (`float`, defaults to `1.0`): Weight of rejected texts in `kto_pair`, >= 0.
        reg_weight (`float`, defaults to `1.0`): lambda of the paper, >= 0: weight of KL(reference || policy) on
            ordinary images. 0 leaves them out.
        in_batch_candidates (`bool`, defaults to `False`): Let the policy choose among all texts of the global
            batch, each once, where no `candidate_texts` are given, instead of each row's own. Under gradient
            accumulation those of one micro-batch of all processes; the rows that fill up a last batch bring theirs.

        logging_nan_inf_filter (`bool`, defaults to `False`): Trainer's filter, which would log a loss of nan as the
            mean of others and asks the device after each batch. Training stops instead, before the weights get it.

        > The model

        train_text_model (`bool`, defaults to `False`): Train the text tower too, instead of keeping it frozen.
        train_logit_scale (`bool`, defaults to `False`): Train the logit scale too.
        model_init_kwargs (`dict`, *optional*): Keyword arguments of `CLIPModel.from_pretrained`, where the trainer
            is given a name.
        base_model_id (`str`, *optional*): What adapters and the model card name as the base model, where it was
            loaded from a folder: its id on the Hub.

        > The images

        on_bad_image (`str`, defaults to `"raise"`): What an image that can't be read or is refused does: `"raise"`
            stops with its row's name; `"skip"` gives what depends on it the weight 0, and logs count such rows in
            `skipped_rows`.

        > The reference

        precompute_ref_log_probs (`bool`, *optional*): Let the reference see each fixed image once, before
            training, and keep its embeddings. `None`: where it pays, that is for fixed images seen in more than
            one epoch. `True`: always, and refuse images that change. `False`: never.
        embeddings_cache (`str`, *optional*): Folder that keeps these embeddings between runs, by a fingerprint of
            image tower, processor, precision and images. Read and written only where embeddings are kept at all: in a
            run of one epoch on fixed images say `precompute_ref_log_probs=True` too.
    """

    # Given as JSON on the command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    optim: str = field(
        default="adamw_torch",
        metadata={"help": "The optimizer: a name of transformers' OptimizerNames, or adamax, the paper's."},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every that many steps; below 1, that share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a loss of nan as the mean of others; training stops before it anyway."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Losses, summed: sigmoid (DPO, S-DPO), ipo, kto_pair, sft (cross-entropy), distillation."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss type; 1 each where it is not given."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull to the reference policy, > 0; tau of IPO."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability in [0, 0.5) that a preference is the wrong way round (sigmoid)."},
    )
    reference_free: bool = field(
        default=False, metadata={"help": "Take the reference's log-ratios of the preferences as 0."}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of chosen texts in kto_pair."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of rejected texts in kto_pair."})
    reg_weight: float = field(
        default=1.0,
        metadata={"help": "lambda: weight of KL(reference || policy) on ordinary images, >= 0."},
    )
    in_batch_candidates: bool = field(
        default=False, metadata={"help": "Every text of the global batch is a candidate of each of its rows."}
    )
    train_text_model: bool = field(default=False, metadata={"help": "Train the text tower too."})
    train_logit_scale: bool = field(default=False, metadata={"help": "Train the logit scale too."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of CLIPModel.from_pretrained, as JSON."}
    )
    base_model_id: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model, for adapters and card, where it came from a folder."},
    )
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "An image that can't be read: raise, or skip its row and count it."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={"help": "Let the reference see each fixed image once, before training; default: if it pays."},
    )

    embeddings_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the reference's embeddings of fixed images between runs."}
    )

    def __post_init__(self) -> None:
        """Check the numbers of the losses before anything is loaded."""
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check()
        # Trainer's list of optimizers lacks torch's Adamax: let TrainingArguments check the rest with another.
        adamax = self.optim == ADAMAX
        if adamax:
            self.optim = "adamw_torch"
        super().__post_init__()
        if adamax:
            self.optim = ADAMAX

    def _check(self) -> None:
        if not isinstance(self.loss_type, (list, tuple)):
            raise TypeError(
                f"loss_type must be the name of a loss or a list of them, got {self.loss_type!r} "
                f"({type(self.loss_type).__name__}); there are {sorted(LOSSES)}."
            )
        unknown = [name for name in self.loss_type if name not in LOSSES]
        if unknown or not self.loss_type:
            raise ValueError(
                f"loss_type must name one or more of {sorted(LOSSES)}, got {self.loss_type!r}. "
                "DPO is 'sigmoid', KTO on pairs 'kto_pair', cross-entropy 'sft'."
            )
        weights = self.loss_weights
        if weights is not None and not (isinstance(weights, (list, tuple)) and len(weights) == len(self.loss_type)):
            raise ValueError(
                f"loss_weights must hold one weight for each of the {len(self.loss_type)} loss types "
                f"{self.loss_type!r}, got {self.loss_weights!r}."
            )
        for position, weight in enumerate(weights or ()):
            check_number(f"loss_weights[{position}]", weight, NOT_NEGATIVE)
        check_number(
            "beta",
            self.beta,
            POSITIVE,
            "To train without a pull to the reference, use loss_type='sft' or reference_free=True.",
        )
        check_number("label_smoothing", self.label_smoothing, SMOOTHING)
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor!r} is Trainer's, for classifiers, and has no "
                "effect here. The conservative DPO loss has label_smoothing."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {self.train_sampling_strategy!r}: "
                "preferences have no lengths to group by."
            )
        if self.on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {self.on_bad_image!r}.")
        for name, allowed in self._numbers().items():
            if (value := getattr(self, name)) is not None:  # clip-po train chooses some by the data later
                check_number(name, value, allowed)
        if self.data_seed is not None:
            check_number("data_seed", self.data_seed, SEED)
        for name in OWN_SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")
        if self.precompute_ref_log_probs not in (None, True, False):
            raise TypeError(
                f"precompute_ref_log_probs must be True, False or None, got {self.precompute_ref_log_probs!r}."
            )
        for name in ("output_dir", "embeddings_cache"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or not str(value)):
                raise TypeError(f"{name} must be the path of a folder, got {value!r}: say where files are to go.")

    def _numbers(self) -> dict[str, Allowed]:
        """Those of `NUMBERS` that count."""
        strategies = {name: getattr(self, strategy) for name, strategy in STEPPED.items()}
        idle = {name for name, strategy in strategies.items() if getattr(strategy, "value", strategy) != "steps"}
        return {name: allowed for name, allowed in NUMBERS.items() if name not in idle}

    def to_dict(self) -> dict[str, Any]:
        """The arguments as trackers and files get them: without secrets, at any depth."""
        return redacted(super().to_dict())

    def __str__(self) -> str:
        """The arguments as logs show them: without secrets, at any depth."""
        shown = sorted(redacted({f.name: getattr(self, f.name) for f in fields(self)}).items())
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    __repr__ = __str__

    @property
    def weights(self) -> list[float]:
        """A weight for each loss type."""
        return self.loss_weights if self.loss_weights is not None else [1.0] * len(self.loss_type)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ContrastivePOConfig:
        """The paper's settings: torch's Adamax, learning rate 2e-5, cosine, 3 epochs, global batch size 512.

        Args:
            name: "dpo" (beta 1.0, lambda 1.0), "ipo" (0.01, 0.01) or "kto" (1.5, 0.01).
            **overrides: Any argument of the configuration; it wins over the preset.

        Returns:
            The configuration.

        Raises:
            ValueError: No such preset.

        Source: Afzali et al. 2025, arXiv 2411.08923, experiments.
        """
        share = preset_batch_size(overrides.get("gradient_accumulation_steps", 1))
        return cls(**{**preset(name), "per_device_train_batch_size": share, **overrides})


def check_args(args: Any, compute_metrics: Any, candidate_texts: Any = None) -> None:
    """Refuse a configuration that a trainer can't use, and settle what depends on the machine.

    Args:
        args: The configuration.
        compute_metrics: As for the trainer.
        candidate_texts: As for the trainer.

    Raises:
        TypeError: No ContrastivePOConfig, or an argument of another type.
        ValueError: Metrics without `batch_eval_metrics`, candidates of two kinds, or a number that was set to what
            it can't be after the configuration was made.
        OSError: `output_dir` can't be written to.
    """
    if not isinstance(args, ContrastivePOConfig):
        raise TypeError(f"args must be a ContrastivePOConfig, got {type(args).__name__}.")
    args._check()
    for name, allowed in args._numbers().items():
        check_number(name, getattr(args, name), allowed)
    if args.should_save:
        check_writable(args.output_dir)
    if compute_metrics is not None and not args.batch_eval_metrics:
        raise ValueError(
            "compute_metrics needs batch_eval_metrics=True in ContrastivePOConfig: evaluation keeps no logits, so "
            "metrics are computed batch by batch. The function takes (eval_prediction, compute_result) and returns "
            "the metrics when compute_result is True."
        )
    if args.in_batch_candidates and candidate_texts is not None:
        raise ValueError(
            "in_batch_candidates=True takes the candidates from each batch, but candidate_texts names them for every "
            "row. Leave one of the two out."
        )
    if args.n_gpu > 1:
        logger.warning(
            f"One process trains on one of the {args.n_gpu} GPUs. To use them all: accelerate launch your_script.py"
        )
        args._n_gpu = 1
    if args.ddp_find_unused_parameters is None:
        # What does not train is frozen, so DDP need not search the graph each step.
        args.ddp_find_unused_parameters = False
