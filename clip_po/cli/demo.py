"""clip-po demo: the embedded model learns not to believe the words on pictures of digits."""

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
from trl import TrlParser

from clip_po.cli.arguments import Task, parse_flags
from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic import TypographicPreferences
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
"""What is compared, with settings found on validation digits; all share `TRAINING`."""

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

    output_dir: str = field(default="demo_output", metadata={"help": "Where report, picture and checkpoint go."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "What to compare.", "choices": list(METHODS)}
    )
    train_renderings: int = field(default=1, metadata={"help": "How often each training digit is drawn."})
    renderings: int = field(default=10, metadata={"help": "How often each of the 500 digits of the table is drawn."})
    seed: int = field(default=0, metadata={"help": "Seed of data, attacks and training."})


def align(method: str, rows: TypographicPreferences, processor: CLIPProcessor, folder: str, seed: int) -> CLIPModel:
    """The embedded model, aligned by one of `METHODS`."""
    trainer = ContrastivePOTrainer(
        load_model(str(MODEL_PATH)),
        args=ContrastivePOConfig(output_dir=folder, seed=seed, **{**TRAINING, **METHODS[method]}),
        train_dataset=rows,
        processing_class=processor,
        candidate_texts=rows.candidate_texts,
    )
    # The demo says itself how far it is, in one line a method.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def measure(
    models: Mapping[str, Any], split: str, renderings: int, processor: CLIPProcessor, seed: int
) -> tuple[RobustnessImages, Answers]:
    """What models answer on digits, fonts and places that no training saw."""
    images = RobustnessImages(
        load_digits_dataset(split, renderings, seed=seed + 1),
        digit_attack("unseen", seed=seed + 1),
        processor,
        DIGIT_NAMES,
        cluster_column="digit",
    )
    return images, evaluate_robustness(models, images, [PROMPT_TEMPLATE], batch_size=250)


def best(answers: Answers, methods: Sequence[str]) -> str:
    """The method with the highest typographic accuracy among those that cost at most one point of clean accuracy."""
    found = {name: robustness_report(answers, name, BASE, resamples=2) for name in methods}
    cheap = [name for name in methods if found[name]["clean_cost"].value <= 1.0] or list(methods)
    return max(cheap, key=lambda name: found[name]["typographic_accuracy"].value)


def main(argv: Sequence[str]) -> None:
    """Train, measure, print the table, and write report, picture and the best checkpoint."""
    (args,) = parse_flags(TrlParser([DemoArguments], prog="clip-po demo"), argv)
    check_writable(args.output_dir, "--output_dir")
    start = time.time()
    logging.disable_progress_bar()  # of loading and saving the few megabytes of the model
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
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
    print("Choosing on validation digits, measuring on unseen ones ...", flush=True)
    _, validation = measure(models, "validation", 3, processor, args.seed + 100)
    chosen = best(validation, args.methods)
    images, answers = measure(models, "test", args.renderings, processor, args.seed)
    found = {name: robustness_report(answers, name, None if name == BASE else BASE) for name in models}

    folder = Path(args.output_dir)
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    models[chosen].save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    Task(DIGIT_NAMES, PROMPT_TEMPLATE).save(checkpoint)
    picture = folder / "before_after.png"
    examples, changes = choose_examples(answers, BASE, chosen, seed=args.seed), changes_line(answers, BASE, chosen)
    before_after_grid(
        examples,
        picture,
        picture=images.picture,
        title=f"What the model says before and after {chosen}",
        subtitle=changes,
    )
    seconds = time.time() - start
    report = write_report(
        folder / "report.json",
        command="demo",
        models=found,
        settings={**asdict(args), "methods": METHODS, "training": TRAINING, "chosen": chosen},
        data={"name": "digits", "split": "test", "rows": len(images), "class_names": DIGIT_NAMES},
        seconds=seconds,
    )
    accuracies = {name: (m["clean_accuracy"], m["typographic_accuracy"]) for name, m in found.items()}
    figures = {
        "Clean against typographic accuracy, with 95% intervals": trade_off_plot(accuracies, base=BASE),
        "Recovery against what each method takes": cost_plot(took, {name: found[name]["recovery"] for name in took}),
    }
    page = report_page(
        read_report(report), examples=examples, picture=images.picture, changes=changes, figures=figures
    )
    written = write_page(folder / "report.html", page)
    print(f"\n{len(images)} pictures of 500 handwritten digits, in fonts and places that no training saw;")
    print("in brackets 95% intervals, clustered by digit:\n")
    print(robustness_table(found))
    print(f"\nBest on validation digits: {chosen}. {seconds:.0f} s.")
    print(f"Checkpoint: {checkpoint}\nReport:     {report}\nPage:       {written}\nPicture:    {picture}")
