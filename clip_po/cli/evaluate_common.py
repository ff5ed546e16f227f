"""What all kinds of `clip-po evaluate` share: the loaded models, the loading of data, and the finished measurement."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import logging

from clip_po.cli.arguments import Task
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.evaluator import Evaluator, Measured, Metrics
from clip_po.evaluation.readable import readable_rows
from clip_po.evaluation.report.answer_tables import write_answers
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.robustness import Answers
from clip_po.models import load_any, read_processor

logger = logging.get_logger(__name__)

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Models:
    """The models to measure, on the device of this process.

    Attributes:
        by_name: "base" and "aligned"; without a base only "aligned", or "model" if clip_po has not trained it.
        processor: Processor of the models.
        accelerator: Accelerator of this process.
    """

    by_name: Mapping[str, Any]
    processor: ProcessorMixin
    accelerator: Accelerator

    @property
    def base(self) -> str | None:
        """The name of the base, None if there is none."""
        return "base" if "base" in self.by_name else None

    def report(self, evaluator: Evaluator[Measured], measured: Mapping[str, Measured]) -> Metrics:
        """Return the metrics of a measurement in the main process, which writes them, and none in the others.

        Args:
            evaluator: The evaluator that measured.
            measured: Its result for each model.

        Returns:
            Estimates by model and metric; empty in other processes than the main one.
        """
        return evaluator.report(measured, self.base, evaluator.resamples) if self.accelerator.is_main_process else {}


def load_models(args: EvaluateArguments, accelerator: Accelerator) -> Models:
    """Load the checkpoint, its processor and, if the arguments name one, the base."""
    processor = read_processor(str(args.model_name_or_path))
    path = str(args.model_name_or_path)
    model = load_any(path)
    if args.base_model_name_or_path is None:
        models = {"model" if Task.load(path) is None else "aligned": model}
    else:
        models = {"base": load_any(args.base_model_name_or_path), "aligned": model}
        if have_same_weights(*models.values()):
            logger.warning(f"{path!r} has the weights of the base: it was not aligned, or nothing was changed.")
    for model in models.values():
        model.to(accelerator.device)
    return Models(models, processor, accelerator)


def have_same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models have the same weights under the same names, bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    return weights.keys() == others.keys() and all(weight.equal(others[name]) for name, weight in weights.items())


def measurable_rows(args: EvaluateArguments, dataset: Dataset, image_column: str, accelerator: Accelerator) -> Dataset:
    """Return the rows to measure: all, or under --on_bad_image skip those whose images can be read.

    Args:
        args: Arguments of the command.
        dataset: The rows.
        image_column: Name of the image column.
        accelerator: Accelerator of this process, which reads a part of the images.

    Returns:
        The rows, the same in every process.

    Raises:
        ValueError: As for `readable_rows`.
    """
    return readable_rows(
        dataset, image_column, args.on_bad_image, num_workers=args.num_workers, accelerator=accelerator
    )


def load_together(load: Callable[[], Loaded], accelerator: Accelerator) -> tuple[Loaded | None, str]:
    """Load data in every process, or in none: a process without data would leave the others waiting.

    Args:
        load: Called without arguments.
        accelerator: Accelerator of this process.

    Returns:
        The data and "", or None and the reason.
    """
    loaded, reason = None, ""
    # The first process downloads, the others find the data in the cache.
    with accelerator.main_process_first():
        try:
            loaded = load()
        except Exception as error:  # the Hub, its cache and the decoders raise errors without a common class
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    reasons = [other for other in gather_object([reason]) if other]
    return (None, reasons[0]) if reasons else (loaded, "")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A finished measurement: what is printed, and what report.json contains.

    Attributes:
        metrics: Estimates by model and metric.
        table: The tables to print; "" for none.
        data: The data as report.json describes them.
        settings: The settings as report.json lists them.
        name: Name of the data or suite, for the default folder of the report.
        answers: Answers of the models, by the beginning of the names of their files; "" for the only ones.
        retention: The section of report.json on other tasks; None if none were measured.
        failure: Why nothing could be measured; "" if something was.
    """

    metrics: Mapping[str, Mapping[str, Estimate]]
    table: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    name: str
    answers: Mapping[str, Answers] = field(default_factory=dict)
    retention: Mapping[str, Any] | None = None
    failure: str = ""

    def write(self, folder: Path, seconds: float) -> dict[str, Path]:
        """Write report.json, and for each set of answers the answer to each image and the accuracy of each class.

        Args:
            folder: Folder of the report.
            seconds: Duration of the command.

        Returns:
            The paths of the files to name, by what they are.
        """
        path = write_report(
            folder / "report.json",
            command="evaluate",
            models=self.metrics,
            settings=self.settings,
            data=self.data,
            retention=self.retention,
            seconds=seconds,
        )
        for prefix, answers in self.answers.items():
            write_answers(folder, answers, prefix)
        return {"Report": path}


def default_folder(beside: Path, name: str, now: str) -> Path:
    """Return a folder that does not exist yet, for a report: no report replaces another, or a file of the checkpoint.

    Args:
        beside: Folder of the checkpoint, or of the reports on models from the Hub.
        name: Name of the data.
        now: Time of the command.

    Returns:
        `beside/evaluation/name/now`, with a number after `now` if another command took it in the same second.
    """
    above = beside / "evaluation" / re.sub(r"[^\w.-]+", "-", name).strip("-.")
    numbered = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(above / name for name in numbered if not (above / name).exists())
