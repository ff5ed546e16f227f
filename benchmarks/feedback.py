"""Train on feedback of each kind whose truth is known, and print agreement and clean accuracy before and after.

    python benchmarks/feedback.py --model path/to/photographs-clip --images path/to/photographs [--kinds sharpness]

Pairs come from labelled photographs: no pair of the test has an image that training has seen.

- class: for the text of a class, a photograph of it against one of the class it is easily taken for.
- sharpness: for the text of a class, a photograph of it against another one of it, blurred or half covered.
- unpaired: a photograph with the text of its class, called right, or of the class it is taken for, called wrong.
- texts and images: preferences between texts, mixed with those of `sharpness` in one run.

Other labelled photographs are the regularization images, with the texts of their classes. A run takes less than a
minute on one core, in bfloat16 with eager attention.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter
from transformers import CLIPProcessor, PrinterCallback
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.loading import load_split
from clip_po.evaluation.evaluator import Evaluator, ZeroShotEvaluator
from clip_po.evaluation.feedback_evaluators import PreferenceEvaluator, UnpairedEvaluator
from clip_po.evaluation.tables import format_table
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer

TEMPLATE = "a photo of a {}"
GREY = (128, 128, 128)
TEXT = Value("string")
PAIRS = (("plane", "ship"), ("car", "truck"), ("bird", "frog"), ("cat", "dog"), ("deer", "horse"))
TAKEN_FOR = {**dict(PAIRS), **{second: first for first, second in PAIRS}}
"""The class that is most like each class."""

SETTINGS = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 64,
    "beta": 1.0,
    "reg_weight": 2.0,
}


def worse(image: Pillow.Image, rng: random.Random) -> Pillow.Image:
    """Return an image blurred, or with one half covered."""
    image = image.convert("RGB")
    if rng.random() < 0.5:
        return image.filter(ImageFilter.GaussianBlur(0.04 * min(image.size)))
    width, height = image.size
    halves = [(0, 0, width // 2, height), (width // 2, 0, width, height), (0, 0, width, height // 2)]
    covered = image.copy()
    ImageDraw.Draw(covered).rectangle(rng.choice(halves), fill=GREY)
    return covered


def by_class(rows: Dataset) -> list[list[int]]:
    """Return the numbers of the rows of each class."""
    found: list[list[int]] = [[] for _ in rows.features["label"].names]
    for number, label in enumerate(rows["label"]):
        found[label].append(number)
    return found


def another(numbers: list[int], number: int, rng: random.Random) -> int:
    """Return one of the numbers that is not `number`."""
    return rng.choice([other for other in numbers if other != number])


def class_pairs(rows: Dataset, rng: random.Random) -> Dataset:
    """For the text of each row's class, its image against one of the class it is taken for."""
    labels, members = rows.features["label"], by_class(rows)
    found: dict[str, list[Any]] = {"text": [], "chosen_image": [], "rejected_image": []}
    for row in rows:
        name = labels.int2str(row["label"])
        found["text"].append(TEMPLATE.format(name))
        found["chosen_image"].append(row["image"])
        found["rejected_image"].append(rows[rng.choice(members[labels.str2int(TAKEN_FOR[name])])]["image"])
    return Dataset.from_dict(found, Features({"text": TEXT, "chosen_image": Image(), "rejected_image": Image()}))


def sharpness_pairs(rows: Dataset, rng: random.Random) -> Dataset:
    """For the text of each row's class, its image against another one of the class, blurred or half covered."""
    labels, members = rows.features["label"], by_class(rows)
    found: dict[str, list[Any]] = {"text": [], "chosen_image": [], "rejected_image": []}
    for number, row in enumerate(rows):
        found["text"].append(TEMPLATE.format(labels.int2str(row["label"])))
        found["chosen_image"].append(row["image"])
        found["rejected_image"].append(worse(rows[another(members[row["label"]], number, rng)]["image"], rng))
    return Dataset.from_dict(found, Features({"text": TEXT, "chosen_image": Image(), "rejected_image": Image()}))


def unpaired(rows: Dataset, rng: random.Random) -> Dataset:
    """Each image with one text: in half of the rows that of its class, else that of the class it is taken for."""
    labels = rows.features["label"]
    found: dict[str, list[Any]] = {"image": [], "text": [], "label": []}
    for row in rows:
        right = rng.random() < 0.5
        named = row["label"] if right else labels.str2int(TAKEN_FOR[labels.int2str(row["label"])])
        found["image"].append(row["image"])
        found["text"].append(TEMPLATE.format(labels.int2str(named)))
        found["label"].append(right)
    return Dataset.from_dict(found, Features({"image": Image(), "text": TEXT, "label": Value("bool")}))


def both_directions(rows: Dataset, rng: random.Random) -> Dataset:
    """Half of the rows as preferences between texts, half as `sharpness_pairs`."""
    labels, half = rows.features["label"], len(rows) // 2
    texts: dict[str, list[Any]] = {"image": [], "chosen": [], "rejected": []}
    for row in rows.select(range(half)):
        texts["image"].append(row["image"])
        texts["chosen"].append(TEMPLATE.format(labels.int2str(row["label"])))
        texts["rejected"].append(TEMPLATE.format(TAKEN_FOR[labels.int2str(row["label"])]))
    between_texts = Dataset.from_dict(texts, Features({"image": Image(), "chosen": TEXT, "rejected": TEXT}))
    return concatenate_datasets([between_texts, sharpness_pairs(rows.select(range(half, len(rows))), rng)])


KINDS: Mapping[str, tuple[Callable[[Dataset, random.Random], Dataset], str, type[Evaluator[Any]]]] = {
    "class": (class_pairs, "sigmoid", PreferenceEvaluator),
    "sharpness": (sharpness_pairs, "sigmoid", PreferenceEvaluator),
    "unpaired": (unpaired, "kto", UnpairedEvaluator),
    "texts and images": (both_directions, "sigmoid", PreferenceEvaluator),
}
"""How pairs are made, the loss, and the evaluator, by kind of feedback."""


def captioned(rows: Dataset) -> Dataset:
    """Return photographs with the texts of their classes."""
    texts = [TEMPLATE.format(rows.features["label"].int2str(label)) for label in rows["label"]]
    return rows.remove_columns("label").add_column("text", texts)


def aligned(
    model: str, rows: Dataset, ordinary: Dataset, loss: str, classes: list[str], seed: int
) -> tuple[Any, float]:
    """Return the trained model and the seconds that training took."""
    texts = [TEMPLATE.format(name) for name in classes] if loss == "kto" else None
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 20}
        args = ContrastivePOConfig(
            folder, loss_type=[loss], seed=seed, bf16=True, use_cpu=True, **{**SETTINGS, **quiet}
        )
        trainer = ContrastivePOTrainer(
            load_model(model, attn_implementation="eager"),  # the fast way in bfloat16 on a CPU
            args=args,
            train_dataset=rows,
            reg_dataset=ordinary,
            candidate_texts=texts,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.time()
        trainer.train()
    return trainer.model, time.time() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test_rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    processor = CLIPProcessor.from_pretrained(args.model)
    images = load_split(args.images, "train").shuffle(seed=args.seed)
    test = load_split(args.images, "test")
    classes = test.features["label"].names
    ordinary = captioned(images.select(range(args.rows, 2 * args.rows)))
    zero_shot = ZeroShotEvaluator(test, processor, [TEMPLATE])
    judged = test.shuffle(seed=args.seed).select(range(args.test_rows))
    base = load_model(args.model)
    clean_before = zero_shot.measure({"before": base}, disable_tqdm=True)
    table = []
    for kind in args.kinds:
        make, loss, evaluator = KINDS[kind]
        rows = make(images.select(range(args.rows)), random.Random(args.seed))
        model, seconds = aligned(args.model, rows, ordinary, loss, classes, args.seed)
        agreement = evaluator(make(judged, random.Random(args.seed + 1)), processor)
        models = {"before": base, "after": model}
        found = agreement.report(agreement.measure(models, disable_tqdm=True), "before", 1000)
        clean_after = zero_shot.measure({"after": model}, disable_tqdm=True)
        clean = zero_shot.report({**clean_before, **clean_after}, "before", 1000)
        pairwise = [found[name]["pairwise_accuracy"] for name in models]
        changes = found["after"]["pairwise_accuracy_difference"], clean["after"]["difference"]
        gain, change = (f"{one.value:+.1f} ({one.low:+.1f} to {one.high:+.1f})" for one in changes)
        table.append(
            [
                kind,
                loss,
                *(f"{100 * one.value:.1f} ({100 * one.low:.1f} to {100 * one.high:.1f})" for one in pairwise),
                gain,
                *(f"{100 * clean[name]['accuracy'].value:.1f}" for name in models),
                change,
                f"{seconds:.0f}",
            ]
        )
        print(table[-1], flush=True)
    columns = ("feedback", "loss", "pairs, before, %", "pairs, after, %", "pairs, points", "clean, before, %")
    print(format_table((*columns, "clean, after, %", "clean, points", "seconds"), table))


if __name__ == "__main__":
    main()
