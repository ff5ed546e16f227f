"""Bias by the written word before and after full training, LoRA and the transformation of embeddings.

    python benchmarks/bias.py --data digits
    python benchmarks/bias.py --data photographs --model path/to/clip --dataset path/to/photographs

Queries are class prompts, images carry a random word, and groups are the words. The table shows all models as trained,
and one chosen model for each way of training. The choice is made on validation images with the attack of training: the
method, and the share of its weights or the scale t, with the lowest NDKL within `--max_clean_cost`. All models are
measured on test images, with fonts that training did not use. The last rows show the floor of the skew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import CLIPModel, CLIPProcessor, PrinterCallback
from transformers.utils import logging
from trl import ModelConfig

from clip_po.cli import demo
from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.train import adapters
from clip_po.cli.train_arguments import BATCH_SIZE, DEFAULTS, fit_to_size
from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.data.class_labels import read_labels
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.loading import load_split
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images, evaluating
from clip_po.evaluation.fairness import (
    WrittenWordEvaluator,
    class_size,
    least_biased,
    written_word_report,
    written_word_scores,
    written_word_table,
)
from clip_po.evaluation.interpolation import interpolate
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import class_embeddings, collect_answers
from clip_po.models import image_size, load_model
from clip_po.trainer import ContrastivePOTrainer

BEFORE = "before"
SOFT: Mapping[str, Mapping[str, Any]] = {"CE + soft": {"loss_type": ["sft", "distillation"], "reg_weight": 1.0}}
CONCEPTS: Mapping[str, Mapping[str, Any]] = {
    "DPO": {"loss_type": ["sigmoid"], "beta": 1.0, "reg_weight": 10.0},
    **SOFT,
}
CONCEPT: Mapping[str, Any] = {
    "penalty_weight": 0.2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 10,
    "warmup_steps": 0,
    "per_device_train_batch_size": 128,
    "bf16": False,
}
"""Arguments shared by the transformations of `CONCEPTS`."""
LORA_RATE = 4  # times the learning rate of full training, as in `fit_to_size`
SCALES = tuple(quarter / 4 for quarter in range(1, 17))
SHARES = (0.4, 0.6, 0.8, 1.0)
"""Shares of the way from the original weights to the trained weights."""


@dataclass(frozen=True)
class Case:
    """One data setup: what is trained and measured.

    Attributes:
        model: Folder or Hub id.
        init: Arguments for loading it.
        processor: Its processor.
        template: Prompt of a class.
        train: Images to train on.
        attack: The attack of training.
        validation: Images to choose on.
        test: Images to report.
        training: Arguments shared by all trainings of weights.
        methods: Arguments by method of full training.
    """

    model: str
    init: Mapping[str, Any]
    processor: CLIPProcessor
    template: str
    train: Dataset
    attack: TypographicAttack
    validation: RobustnessImages
    test: RobustnessImages
    training: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]

    def load(self) -> CLIPModel:
        """Load the original model."""
        return load_model(self.model, **self.init)


def digits(args: argparse.Namespace) -> Case:
    """Return the case of the embedded model, with the settings of `clip-po demo`."""
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)

    def images(split: str, renderings: int, seed: int, settings: str) -> RobustnessImages:
        rows = cut(load_digits_dataset(split, renderings, seed=seed), args.rows, args.seed)
        attack = digit_attack(settings, seed=seed)
        return RobustnessImages(rows, attack, processor, DIGIT_NAMES, cluster_column="digit", keep_bytes=2**30)

    return Case(
        str(MODEL_PATH),
        {},
        processor,
        PROMPT_TEMPLATE,
        cut(load_digits_dataset("train", args.train_renderings, seed=args.seed), args.rows, args.seed),
        digit_attack("training", seed=args.seed),
        images("validation", 3, args.seed + 100, "training"),
        images("test", args.renderings or 10, args.seed + 1, "unseen"),
        demo.TRAINING,
        {**demo.METHODS, **SOFT},
    )


def photographs(args: argparse.Namespace) -> Case:
    """Return the case of any labelled images, with the settings of `clip-po train`."""
    processor = CLIPProcessor.from_pretrained(args.model)
    train, validation, test = (
        cut(load_split(args.dataset, split), args.rows, args.seed)
        for split in (args.train_split, args.validation_split, args.test_split)
    )
    names, _ = read_labels(train, "label", None)
    init = {"attn_implementation": "eager"} if args.bf16 else {}
    width = load_model(args.model, **init).config.vision_config.hidden_size

    def attack(fonts: tuple[str, ...], seed: int) -> TypographicAttack:
        return TypographicAttack(names, fonts=fonts, min_side=image_size(processor) or 224, seed=seed)

    def images(rows: Dataset, attack: TypographicAttack, renderings: int) -> RobustnessImages:
        return RobustnessImages(rows, attack, processor, names, renderings=renderings, keep_bytes=2**30)

    return Case(
        args.model,
        init,
        processor,
        DEFAULT_TEMPLATE,
        train,
        attack(training_fonts(), args.seed),
        images(validation, attack(training_fonts(), args.seed + 100), 1),
        images(test, attack(unseen_fonts(), args.seed + 1), args.renderings or 2),
        {
            **demo.TRAINING,  # logging arguments
            **{name: value for name, value in DEFAULTS.items() if value is not None and name != "lora_dropout"},
            **fit_to_size(width, len(train), False),
            "learning_rate": 3e-4 * (128 / width) ** 2,  # that of the results in docs/bias.md
            "per_device_train_batch_size": BATCH_SIZE,
            "save_strategy": "no",
            "bf16": args.bf16,
        },
        {"DPO": {"loss_type": ["sigmoid"], "reg_weight": 2.0}, **SOFT},
    )


def cut(dataset: Dataset, rows: int | None, seed: int) -> Dataset:
    """Return at most that many rows, drawn at random."""
    return dataset if rows is None or rows >= len(dataset) else dataset.shuffle(seed=seed).select(range(rows))


def train(case: Case, args: argparse.Namespace, redraw: str, settings: Mapping[str, Any], **how: Any) -> Any:
    """Train a model, or the transformation of its embeddings, on the preferences of the case."""
    names = case.test.class_names
    attack = dataclasses.replace(case.attack, redraw=redraw)
    rows = TypographicPreferences(case.train, attack, names, case.template)
    with tempfile.TemporaryDirectory() as folder:
        common = {"seed": args.seed, "max_steps": args.max_steps, "use_cpu": args.bf16}
        trainer_class, config = ContrastivePOTrainer, ContrastivePOConfig
        if "concept" in how:
            trainer_class, config = ConceptTrainer, ConceptConfig
        trainer = trainer_class(
            case.load(),
            args=config(folder, **{**case.training, **common, **settings}),
            train_dataset=rows,
            processing_class=case.processor,
            candidate_texts=rows.candidate_texts,
            **how,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval()


def log(text: str) -> None:
    """Print progress to standard error. Only the table goes to standard output."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def train_weights(case: Case, args: argparse.Namespace, way: str) -> dict[str, CLIPModel]:
    """Train the models, in full or with LoRA, and return them by method."""
    found = {}
    for method, settings in case.methods.items():
        if way == "LoRA" and method not in args.lora:
            continue
        log(f"{way}: {method}")
        peft, faster = None, 1
        if way == "LoRA":
            everything = ContrastivePOConfig("lora", use_cpu=True)
            peft, faster = adapters(ModelConfig(use_peft=True), case.load(), everything), LORA_RATE
        rate = {"learning_rate": faster * case.training["learning_rate"]}
        found[method] = train(case, args, "every_epoch", {**settings, **rate}, peft_config=peft)
    return found


def train_concepts(case: Case, args: argparse.Namespace) -> dict[str, ConceptTransform]:
    """Train the transformations and return them by method."""
    found = {}
    for method, settings in CONCEPTS.items():
        log(f"transformation: {method}")
        concept = ConceptTransform(case.load().config.projection_dim)
        # On embeddings a run takes seconds, so the settings for training weights, such as bf16, do not apply.
        found[method] = train(case, args, "never", {**CONCEPT, **settings}, concept=concept)
    return found


def scaled_scores(
    case: Case, concepts: Mapping[str, ConceptTransform], images: RobustnessImages, batch_size: int
) -> dict[str, Any]:
    """Score the transformations at `SCALES`, embedding each image once. BEFORE is the model without one."""
    model = case.load()
    texts = class_embeddings(model, case.processor, images.class_names, [case.template])
    found: dict[str, Any] = {}
    for variant in ("clean", "typographic"):

        def embeds(batch: dict[str, torch.Tensor], variant: str = variant) -> torch.Tensor:
            return encode_images(model, batch[variant])

        with evaluating(model):
            width = texts.shape[1]
            table = collect_answers(images, embeds, width, batch_size, disable_tqdm=True, dtype=torch.float32)
            embedded = torch.from_numpy(table)
            found[variant] = {BEFORE: (texts @ embedded.T).numpy()}
            for (method, concept), t in itertools.product(concepts.items(), SCALES):
                image_embeds, text_embeds = concept.at(t)(embedded, texts)
                found[variant][method, t] = (text_embeds @ image_embeds.T).numpy()
    return found


def choose(scores: dict[str, Any], images: RobustnessImages, max_clean_cost: float) -> Any:
    """Return the key of the least biased model on validation images within the allowed clean cost."""
    found = written_word_report(scores, images, BEFORE, resamples=0)
    asked = {key: found[key] for key in scores["clean"] if key != BEFORE}
    for key, metrics in asked.items():
        log(f"validation, {key}: NDKL {metrics['ndkl'].value:.3f}, clean cost {metrics['clean_cost'].value:.2f}")
    return least_biased(asked, "ndkl", max_clean_cost)


def contestants(case: Case, args: argparse.Namespace) -> dict[str, CLIPModel]:
    """Return all models of the table by name: as trained, and the chosen one for each way of training."""
    base, images = case.load(), case.validation
    found: dict[str, Any] = {BEFORE: base}
    chosen: dict[str, Any] = {}
    for way in ("full", "LoRA"):
        trained = train_weights(case, args, way)
        found |= {f"{method}, {way}": model for method, model in trained.items()}
        log(f"choosing: {way}")
        mixed = {(m, share): interpolate(base, model, share) for m, model in trained.items() for share in SHARES}
        asked: dict[Any, Any] = {BEFORE: base, **mixed}
        scores = written_word_scores(asked, images, [case.template], batch_size=args.batch_size, disable_tqdm=True)
        method, share = choose(scores, images, args.max_clean_cost)
        chosen[f"chosen, {way}: {share:g} of {method}"] = mixed[method, share]
    concepts = train_concepts(case, args)
    found |= {f"{method}, transformation, t = 1": concept.fold_into(base) for method, concept in concepts.items()}
    log("choosing: transformation")
    method, t = choose(scaled_scores(case, concepts, images, args.batch_size), images, args.max_clean_cost)
    chosen[f"chosen, transformation: t = {t:g} of {method}"] = concepts[method].fold_into(base, t)
    return {**found, **chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "photographs"), required=True)
    parser.add_argument("--model", help="for photographs: folder or Hub id of a CLIPModel")
    parser.add_argument("--dataset", help="for photographs: labelled images, folder or Hub id")
    parser.add_argument("--train_split", default="train[:4000]")
    parser.add_argument("--validation_split", default="train[18000:]")
    parser.add_argument("--test_split", default="test")
    parser.add_argument("--train_renderings", type=int, default=1, help="for digits: training renderings of each")
    parser.add_argument("--renderings", type=int, help="attacks per test image; 10 for digits, 2 for photographs")
    parser.add_argument("--rows", type=int, help="use at most this many rows of each split")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=list(SOFT),
        choices=sorted({*demo.METHODS, *SOFT}),
        help="methods to train with LoRA",
    )
    parser.add_argument("--max_clean_cost", type=float, default=0.5, help="maximum clean cost of a chosen model")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop every training after this many steps")
    parser.add_argument("--bf16", action="store_true", help="for photographs: train in bf16, faster on a CPU")
    parser.add_argument("--batch_size", type=int, default=250, help="images per forward pass outside training")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write all metrics to this file")
    args = parser.parse_args()
    if args.data == "photographs" and not (args.model and args.dataset):
        parser.error("--data photographs needs --model and --dataset")
    start = time.time()
    logging.disable_progress_bar()
    case = digits(args) if args.data == "digits" else photographs(args)
    models = contestants(case, args)
    log("measuring")
    k = class_size(case.test)
    evaluator = WrittenWordEvaluator(
        case.test, [case.template], k, batch_size=args.batch_size, resamples=args.resamples, seed=args.seed
    )
    found = evaluator(models, BEFORE, disable_tqdm=True)
    print(written_word_table(found, k))
    images = len(np.unique(case.test.cluster))
    log(f"{len(case.test)} renderings of {images} images, k = {k}; {time.time() - start:.0f} s")
    if args.json is not None:
        trained = {"training": case.training, "methods": case.methods, "concept": CONCEPT, "concepts": CONCEPTS}
        write_report(
            args.json,
            command="benchmarks/bias.py",
            models=found,
            settings=vars(args) | trained,
            data={"renderings": len(case.test), "images": images, "k": k},
            seconds=time.time() - start,
        )


if __name__ == "__main__":
    main()
