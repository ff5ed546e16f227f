"""clip-po demo: align the embedded model on pictures of digits with words on them, by several methods."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import CLIPModel, CLIPProcessor, PrinterCallback
from transformers.utils import logging

from clip_po.cli.arguments import Task
from clip_po.cli.flags import FlagParser, parse_flags
from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.before_after import before_after_grid, changes_line, choose_examples
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.plots import cost_plot, trade_off_plot
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.robustness import (
    Answers,
    RobustnessImages,
    evaluate_robustness,
    robustness_report,
    robustness_table,
)
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer
from clip_po.validation import check_writable

BASE = "before"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "CE": {"loss_type": ["sft"], "reg_weight": 2.0},
    "CE + soft": {"loss_type": ["sft", "distillation"], "reg_weight": 1.0},
    "DPO": {"loss_type": ["sigmoid"], "beta": 1.0, "reg_weight": 2.0},
    "IPO": {"loss_type": ["ipo"], "beta": 0.1, "reg_weight": 10.0},
    "KTO": {"loss_type": ["kto_pair"], "beta": 1.0, "reg_weight": 1.0},
}
"""Compared methods and their settings, found on validation digits. They share the settings in `TRAINING`."""

TRAINING: Mapping[str, Any] = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "report_to": "none",
}


@dataclass
class DemoArguments:
    """Arguments of `clip-po demo`."""

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for report, picture and checkpoint."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare.", "choices": list(METHODS)}
    )
    train_renderings: int = field(default=1, metadata={"help": "Renderings of each training digit."})
    renderings: int = field(default=10, metadata={"help": "Renderings of each of the 500 test digits."})
    seed: int = field(default=0, metadata={"help": "Seed of data, attacks and training."})


def main(argv: Sequence[str]) -> None:
    """Align by each method and measure; write report, page, picture and the best checkpoint; print the table."""
    (args,) = parse_flags(FlagParser([DemoArguments], "demo"), argv)
    check_writable(args.output_dir, "--output_dir")
    start = time.time()
    logging.disable_progress_bar()  # of loading and saving the few megabytes of the model
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    models, took = align_all(args, processor)
    result = measure_all(models, args, processor)
    save_checkpoint(models[result.chosen], processor, Path(args.output_dir, "checkpoint"))
    seconds = time.time() - start
    write(result, took, args, seconds)
    print_result(result, Path(args.output_dir), seconds)


@dataclass(frozen=True)
class DemoResult:
    """The measured models and the chosen method.

    Attributes:
        images: The test images.
        answers: The answers of all models on them.
        metrics: The metrics of each model, by name.
        chosen: The best method on validation digits.
    """

    images: RobustnessImages
    answers: Answers
    metrics: Mapping[str, Mapping[str, Estimate]]
    chosen: str


def align_all(args: DemoArguments, processor: CLIPProcessor) -> tuple[dict[str, Any], dict[str, float]]:
    """Align the embedded model by each method.

    Returns:
        The models by method, with the unaligned one as `BASE`, and the seconds that each method took.
    """
    digits = load_digits_dataset("train", args.train_renderings, seed=args.seed)
    rows = TypographicPreferences(digits, digit_attack("training", seed=args.seed), DIGIT_NAMES, PROMPT_TEMPLATE)
    took: dict[str, float] = {}
    models: dict[str, Any] = {BASE: load_model(str(MODEL_PATH))}
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            print(f"Aligning by {method:<9}", end="", flush=True)
            began = time.time()
            models[method] = align(method, rows, processor, scratch, args.seed)
            took[method] = time.time() - began
            print(f"{took[method]:4.0f} s", flush=True)
    return models, took


def align(method: str, rows: TypographicPreferences, processor: CLIPProcessor, folder: str, seed: int) -> CLIPModel:
    """Return the embedded model, aligned by one of `METHODS`."""
    trainer = ContrastivePOTrainer(
        load_model(str(MODEL_PATH)),
        args=ContrastivePOConfig(output_dir=folder, seed=seed, **{**TRAINING, **METHODS[method]}),
        train_dataset=rows,
        processing_class=processor,
        candidate_texts=rows.candidate_texts,
    )
    # The demo prints its own progress, one line per method.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def measure_all(models: Mapping[str, Any], args: DemoArguments, processor: CLIPProcessor) -> DemoResult:
    """Choose the best method on validation digits and measure all models on test digits."""
    print("Choosing on validation digits, measuring on unseen ones ...", flush=True)
    _, validation = measure(models, "validation", 3, processor, args.seed + 100)
    chosen = best(validation, args.methods)
    images, answers = measure(models, "test", args.renderings, processor, args.seed)
    metrics = {name: robustness_report(answers, name, None if name == BASE else BASE) for name in models}
    return DemoResult(images, answers, metrics, chosen)


def measure(
    models: Mapping[str, Any], split: str, renderings: int, processor: CLIPProcessor, seed: int
) -> tuple[RobustnessImages, Answers]:
    """Evaluate models on digits, fonts and positions that training did not use."""
    images = RobustnessImages(
        load_digits_dataset(split, renderings, seed=seed + 1),
        digit_attack("unseen", seed=seed + 1),
        processor,
        DIGIT_NAMES,
        cluster_column="digit",
    )
    return images, evaluate_robustness(models, images, [PROMPT_TEMPLATE], batch_size=250)


def best(answers: Answers, methods: Sequence[str]) -> str:
    """Return the method with the highest typographic accuracy at a clean cost of at most one percentage point.

    If every method costs more, all of them are candidates.
    """
    found = {name: robustness_report(answers, name, BASE, resamples=2) for name in methods}
    cheap = [name for name in methods if found[name]["clean_cost"].value <= 1.0] or list(methods)
    return max(cheap, key=lambda name: found[name]["typographic_accuracy"].value)


def save_checkpoint(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Save a model with processor and task, in place of an earlier checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Task(DIGIT_NAMES, PROMPT_TEMPLATE).save(folder)


def write(result: DemoResult, took: Mapping[str, float], args: DemoArguments, seconds: float) -> None:
    """Write before_after.png, report.json and report.html to the output folder."""
    folder, images, chosen = Path(args.output_dir), result.images, result.chosen
    examples = choose_examples(result.answers, BASE, chosen, seed=args.seed)
    changes = changes_line(result.answers, BASE, chosen)
    before_after_grid(
        examples,
        folder / "before_after.png",
        picture=images.picture,
        title=f"What the model says before and after {chosen}",
        subtitle=changes,
    )
    report = write_report(
        folder / "report.json",
        command="demo",
        models=result.metrics,
        settings={**asdict(args), "methods": METHODS, "training": TRAINING, "chosen": chosen},
        data={"name": "digits", "split": "test", "rows": len(images), "class_names": DIGIT_NAMES},
        seconds=seconds,
    )
    accuracies = {name: (m["clean_accuracy"], m["typographic_accuracy"]) for name, m in result.metrics.items()}
    figures = {
        "Clean against typographic accuracy, with 95% intervals": trade_off_plot(accuracies, base=BASE),
        "Recovery against what each method takes": cost_plot(
            took, {name: result.metrics[name]["recovery"] for name in took}
        ),
    }
    page = report_page(
        read_report(report), examples=examples, picture=images.picture, changes=changes, figures=figures
    )
    write_page(folder / "report.html", page)


def print_result(result: DemoResult, folder: Path, seconds: float) -> None:
    """Print the table, the best method and where the files are."""
    print(f"\n{len(result.images)} images of 500 digits, with fonts and positions that were not used in training.")
    print("Brackets are 95% intervals, clustered by digit:\n")
    print(robustness_table(result.metrics))
    print(f"\nBest on validation digits: {result.chosen}. {seconds:.0f} s.")
    print(f"Checkpoint: {folder / 'checkpoint'}\nReport:     {folder / 'report.json'}")
    print(f"Page:       {folder / 'report.html'}\nPicture:    {folder / 'before_after.png'}")
