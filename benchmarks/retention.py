"""What a model keeps while it is aligned on one task: other classes, people, other words; a table of docs/results.md.

    python benchmarks/retention.py --model path/to/clip --task path/to/photographs --others path/to/forty_things \
        --people path/to/faces --generic path/to/thousand_things --words words.txt --output_dir /tmp/retention

Each method is `clip-po train` with the flags of its row. By default, models are measured on images of the train splits
that the methods do not see, so that methods can be chosen; `--part test` measures on the test splits. Results are kept
in the output folder, and a method with a result is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from transformers import CLIPModel, CLIPProcessor, TrainerCallback
from transformers.utils import logging

from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.train import align
from clip_po.cli.train_arguments import parse
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.fonts import unseen_fonts
from clip_po.data.class_labels import read_labels
from clip_po.data.loading import load_split
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.evaluator import RobustnessEvaluator
from clip_po.evaluation.interpolation import interpolate
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_table
from clip_po.models import image_size, load_model

KL = ["--reg_type", "kl", "--reg_weight", "2", "--reg_share", "0"]
EMBEDDING = ["--reg_type", "embedding", "--reg_weight", "40"]
CE = ["--loss_type", "sft"]
SOFT = ["--loss_type", "sft", "distillation"]
DISTILLED = ["--loss_type", "sft", "embedding_distillation", "--loss_weights", "3", "40"]
EVERYDAY = ["--attack_words", "everyday"]
COLLAGES = ["--reg_share", "0.5"]

METHODS: Mapping[str, Sequence[str]] = {
    "default": [],
    "default, photographs": ["--reg_dataset_name", "GENERIC"],
    "default, label-free": ["--labels", "reference"],
    "default, label-free, photographs": ["--labels", "reference", "--reg_dataset_name", "GENERIC"],
    "default, LoRA": ["--use_peft"],
    "default, last two blocks": ["--trainable_layers", "2"],
    "default, moving average": ["--moving_average", "0.7"],
    "DPO": ["--loss_type", "sigmoid", *KL],
    "IPO": ["--loss_type", "ipo", "--beta", "0.1", "--reg_weight", "20"],
    "KTO": ["--loss_type", "kto_pair", "--reg_weight", "1"],
    "S-DPO": ["--loss_type", "sigmoid", "--rejected", "others", *KL],
    "CE": [*CE, *KL],
    "CE + soft": [*SOFT, "--reg_weight", "1"],
    "CE + soft, everyday words": [*SOFT, "--reg_weight", "1", *EVERYDAY],
    "CE + soft, open KL": [*SOFT, "--reg_type", "kl_open", "--reg_weight", "1", *EVERYDAY],
    "CE + embedding": [*DISTILLED, *EMBEDDING, "--reg_share", "0"],
    "CE + embedding, everyday words": [*DISTILLED, *EMBEDDING, "--reg_share", "0", *EVERYDAY],
    "CE + embedding, collages": [*DISTILLED, *EMBEDDING, *COLLAGES],
    "DPO + embedding, collages": [
        *("--loss_type", "sigmoid", "embedding_distillation", "--loss_weights", "1", "40"),
        *(*EMBEDDING, *COLLAGES, *EVERYDAY),
    ],
    "strength 10": ["--loss_weights", "3", "10", "--reg_weight", "10"],
    "strength 160": ["--loss_weights", "3", "160", "--reg_weight", "160"],
    "half the learning rate": ["--learning_rate", "1e-4"],
    "twice the learning rate": ["--learning_rate", "4e-4"],
}
"""Flags of `clip-po train` by method. GENERIC stands for --generic."""

INTERPOLATED: Mapping[str, tuple[str, float]] = {"CE + soft, interpolation .7": ("CE + soft", 0.7)}
"""Methods that interpolate between the base and another method (WiSE-FT), with alpha."""

PULLED: Mapping[str, tuple[str, float]] = {"CE + soft, L2 to the start": ("CE + soft", 1e-3)}
"""Methods with a pull of the weights to their start (L2-SP, Li et al. 2018, arXiv 1802.01483), with its strength."""


@dataclass(frozen=True)
class Pull(TrainerCallback):
    """Draws the weights to their start after each step, in proportion to the learning rate: decoupled L2-SP.

    Args:
        strength: Share of the way back at the highest learning rate.
    """

    strength: float

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep the weights that train."""
        self.__dict__["start"] = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Go back a little."""
        share = self.strength * lr_scheduler.get_last_lr()[0] / args.learning_rate
        for weight, start in self.__dict__["start"]:
            weight.lerp_(start, share)


@dataclass(frozen=True)
class Judge:
    """Measures models on the task, on other classes, on people, and over all words.

    Attributes:
        base: The model before.
        robust: Evaluators by set: the task and the other classes, attacked with their own class names.
        kept: Accuracy on people and on the other classes among all words.
        drift: Drift on the other classes.
    """

    base: CLIPModel
    robust: Mapping[str, RobustnessEvaluator]
    kept: RetentionEvaluator
    drift: DriftEvaluator

    def __call__(self, model: CLIPModel) -> dict[str, Estimate]:
        """Return the columns of the table."""
        models = {"base": self.base, "aligned": model}
        found: dict[str, Estimate] = {}
        for name, evaluator in self.robust.items():
            metrics = evaluator(models, "base", disable_tqdm=True)["aligned"]
            found |= {f"{name}: {metric}": metrics[metric] for metric in ("recovery", "clean_cost", "reading_effect")}
        kept = self.kept(models, "base", disable_tqdm=True)["aligned"]
        found |= {name: kept[f"{name}: retention_cost"] for name in self.kept.sets}
        drift = self.drift(models, "base", disable_tqdm=True)["aligned"]
        return found | {f"drift: {name}": estimate for name, estimate in drift.items()}


COLUMNS: Mapping[str, str] = {
    "task: recovery": "task: recovery",
    "task: clean_cost": "cost",
    "task: reading_effect": "reading",
    "others: clean_cost": "others: cost",
    "others: recovery": "recovery",
    "others: reading_effect": "reading",
    "man or woman": "man or woman: cost",
    "groups": "groups: cost",
    "all words": "all words: cost",
    "drift: kl": "KL",
    "drift: agreement": "same answer",
    "drift: cosine": "cosine",
}
"""Measured values in the order of the table, with the headers of their columns."""


def judge(args: argparse.Namespace, base: CLIPModel, processor: CLIPProcessor) -> Judge:
    """Load the images to measure on."""
    parts = {"dev": ("train[17000:]", "train[:2000]", "train[:1500]"), "test": ("test", "test", "test")}[args.part]
    task, others, people = (
        load_split(name, split) for name, split in zip((args.task, args.others, args.people), parts, strict=True)
    )

    def robust(rows: Dataset) -> RobustnessEvaluator:
        names, _ = read_labels(rows, "label", None)
        attack = TypographicAttack(names, fonts=unseen_fonts(), min_side=image_size(processor) or 224, seed=1000)
        images = RobustnessImages(rows, attack, processor, names, keep_bytes=2**30)
        return RobustnessEvaluator(images, [DEFAULT_TEMPLATE], batch_size=256)

    names, _ = read_labels(others, "label", None)
    words = list(dict.fromkeys([*names, *Path(args.words).read_text().split()]))
    gender, group = people.features["gender"].names, people.features["group"].names
    adults = [number for number, name in enumerate(group) if name in gender]
    grown = people.filter(lambda value: value in adults, input_columns="group")
    prompts = [DEFAULT_TEMPLATE]
    kept = {
        "man or woman": RetentionSet(grown, prompts, gender, label_column="gender"),
        "groups": RetentionSet(people, prompts, group, label_column="group"),
        "all words": RetentionSet(others.cast_column("label", Value("int64")), prompts, words),
    }
    texts = [DEFAULT_TEMPLATE.replace("{}", word) for word in words]
    return Judge(
        base,
        {"task": robust(task), "others": robust(others)},
        RetentionEvaluator(kept, processor, batch_size=256),
        DriftEvaluator(others, processor, texts, batch_size=256),
    )


def train(args: argparse.Namespace, name: str, seed: int) -> CLIPModel:
    """Train one method and return its model."""
    of, alpha = INTERPOLATED.get(name, (name, 1.0))
    of, strength = PULLED.get(of, (of, 0.0))
    flags = [args.generic if flag == "GENERIC" else flag for flag in METHODS[of]]
    folder = Path(args.output_dir, "run")
    shutil.rmtree(folder, ignore_errors=True)
    shared = {
        "model_name_or_path": args.model,
        "dataset_name": args.task,
        "dataset_train_split": args.train_split,
        "output_dir": str(folder),
        "seed": str(seed),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    given = [word for key, value in shared.items() if f"--{key}" not in flags for word in (f"--{key}", value)]
    if args.max_steps:
        given += ["--max_steps", str(args.max_steps)]
    task_args, config, model_args = parse([*given, *flags])
    callbacks = [Pull(strength)] if strength else []
    trainer, _ = align(replace_callbacks(task_args, callbacks), config, model_args)
    return interpolate(trainer.reference.model, trainer.model, alpha)


def replace_callbacks(task_args: Any, callbacks: Sequence[TrainerCallback]) -> Any:
    """Return the arguments of a training, which adds callbacks to its own."""
    own = task_args.callbacks
    task_args.callbacks = lambda: [*own(), *callbacks]
    return task_args


def result(args: argparse.Namespace, ask: Judge, name: str, seed: int) -> dict[str, Any]:
    """Return the stored result of a method and seed, after running it if there is none."""
    file = Path(args.output_dir, f"{args.part}-{name.replace(' ', '-')}-{seed}.json")
    if file.exists():
        return json.loads(file.read_text())
    start = time.time()
    model = train(args, name, seed).to(ask.base.device)
    seconds = time.time() - start
    found = {key: estimate.as_dict() for key, estimate in ask(model).items()}
    file.write_text(json.dumps({"seconds": seconds, **found}, indent=1))
    print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}: {seconds:.0f} s", flush=True)
    return json.loads(file.read_text())


def row(results: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the cells of a method: of one seed with intervals, of several their means with the mean interval."""
    return [
        Estimate(*(float(np.mean([found[key][end] for found in results])) for end in ("value", "low", "high")))
        for key in COLUMNS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "task", "others", "people", "generic", "words", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train_split", default="train[:4000]")
    parser.add_argument("--part", choices=("dev", "test"), default="dev", help="images to measure on")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *INTERPOLATED, *PULLED], help="rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max_steps", type=int, help="stop each training early, to try the script")
    args = parser.parse_args()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processor = CLIPProcessor.from_pretrained(args.model)
    ask = judge(args, load_model(args.model).eval(), processor)
    table = [[name, *row([result(args, ask, name, seed) for seed in args.seeds])] for name in args.methods]
    print(format_table(["method", *COLUMNS.values()], table))


if __name__ == "__main__":
    main()
