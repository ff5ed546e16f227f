"""Arguments of clip-po steer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clip_po.cli.arguments import TaskArguments
from clip_po.cli.flags import FlagParser, parse_flags, resumed_checkpoint
from clip_po.concept.sweep import SCALES
from clip_po.concept.trainer import ConceptConfig
from clip_po.evaluation.bounds import check_bound
from clip_po.validation import COUNT, check_number

DEFAULTS: Mapping[str, Any] = {
    "output_dir": "steered",
    "loss_type": ["sigmoid"],
    "beta": 1.0,
    "reg_weight": 10.0,
    "penalty_weight": 0.2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
}
"""Default settings of the training, found on the digits. There, only with DPO and KTO did the share of answers that
follow the written word fall with t on both sides of 0."""


@dataclass
class SteerArguments(TaskArguments):
    """Arguments of `clip-po steer` in addition to those of the trainer."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a CLIPModel. Default: the demo's model, with its digits."}
    )
    t: list[float] = field(
        default_factory=lambda: list(SCALES), metadata={"help": "Scales t to measure for the table."}
    )
    choose: Literal["neutral", "at_most"] = field(
        default="neutral",
        metadata={
            "help": "How to choose the saved t on validation images. neutral: as many answers follow the written word "
            "as are right; at_most: the fewest answers follow the word at a clean cost of at most max_clean_cost.",
        },
    )
    max_clean_cost: float = field(
        default=0.5, metadata={"help": "Clean accuracy that may be lost with choose=at_most, in percentage points."}
    )
    path: Literal["singular", "straight"] | None = field(
        default=None,
        metadata={
            "help": "How to scale W. singular: U S^t V^T; straight: (1 - t) I + t W. Default: singular if both towers "
            "share W, otherwise straight.",
        },
    )
    towers: Literal["shared", "each", "image"] = field(
        default="shared", metadata={"help": "One W for both towers, one for each, or one for images only."}
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": "Trained transformation to use instead of training one: folder (an earlier output_dir) or Hub id."
        },
    )
    renderings: int | None = field(
        default=None,
        metadata={
            "help": "Attacked copies of each image to choose t and to measure. Default: 1; for the digits 5 and 10."
        },
    )
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to choose t on. Default: a tenth of the training rows, held out."},
    )

    def __post_init__(self) -> None:
        """Raise if arguments can't work, before anything is loaded."""
        if (self.dataset_name is None) != (self.model_name_or_path is None):
            missing = "--dataset_name" if self.dataset_name is None else "--model_name_or_path"
            raise ValueError(f"{missing} is missing. Give a model and a dataset, or neither for the embedded digits.")
        self.check()
        self.check_single_prompt()
        check_bound(self.max_clean_cost)
        if not self.t or not all(math.isfinite(t) for t in self.t):
            raise ValueError(f"--t must be one or more finite numbers, got {self.t}. For example: --t -1 0 0.5 1.")
        if self.renderings is not None:
            check_number("--renderings", self.renderings, COUNT)


def parse(argv: Sequence[str]) -> tuple[SteerArguments, ConceptConfig]:
    """Parse the arguments. Flags override the YAML file (`--config`), which overrides `DEFAULTS`."""
    parser = FlagParser([SteerArguments, ConceptConfig], "steer")
    parser.set_defaults_with_config(**DEFAULTS, disable_tqdm=not sys.stderr.isatty())
    args, config = parse_flags(parser, argv)
    config.resume_from_checkpoint = resumed_checkpoint(config.resume_from_checkpoint)
    return args, config
