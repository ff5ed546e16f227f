"""Bias of searches for occupations, and gender turned by t: the tables of people in docs/bias.md and docs/steer.md.

    python benchmarks/people.py --model path/to/broad-clip --faces path/to/faces --things path/to/forty_things

The model is a CLIPModel that was trained with a bias; the faces have the columns gender, group (man, woman, child,
elder), race and age, and the things are other labelled images. Each face of a man is trained towards the reference's
answer over occupations and everyday nouns on the face of a woman of the same race and similar age, and the reverse;
other rows keep what the model says of people and things. How far to go on that way (share of the weights, or scale t)
is the step with the lowest NDKL by gender over the trained occupations on training faces that were left out. The last
part of the table are closed forms. All is measured on the test splits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from people_tables import bias_tables, draw_plots, steering_table
from transformers import CLIPModel, CLIPProcessor, PrinterCallback
from transformers.utils import logging
from trl import ModelConfig

from clip_po.baselines import (
    drop_informative_features,
    project_out_attribute,
    project_out_biased_prompts,
    project_out_directions,
)
from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.train import adapters
from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.counterfactual import counterfactual_rows, counterparts
from clip_po.data.loading import load_split
from clip_po.data.vocabulary import EVERYDAY_WORDS
from clip_po.encoding import encode_images, encode_texts, evaluating
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.fairness import FairnessEvaluator, chance_level, fairness_report
from clip_po.evaluation.interpolation import interpolate
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet
from clip_po.evaluation.zero_shot import CleanImages, collect_answers
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer

OCCUPATIONS = ("doctor", "nurse", "boss", "clerk", "driver", "teacher")
SEEN = OCCUPATIONS[:3]
"""The occupations of the second training. The others are never in its preferences."""
GROUPS = ("man", "woman", "child", "elder")
STEPS = tuple(step / 20 for step in range(1, 21))
"""Shares of the weights, and scales t, from which one is chosen."""
SCALES = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
BEFORE = "before"
KEEP, KEEP_STEERED = 5.0, 10.0
"""Weights of the rows that keep answers, when occupations are trained and when gender is turned."""
TURN = 0.32
"""Weight of the reversed answer against the own one in the training of the steered W: t = 1 turns so far."""
NOUNS = 15
"""Everyday nouns beside the occupations in the rows that exchange answers. With them, the answers over occupations
that are in no row change too."""
DROPPED = 32
"""Dimensions that feature clipping drops, of 128."""

TRAINING: Mapping[str, Any] = {
    "loss_type": ["distillation"],
    "reg_weight": 0.0,  # rows whose target is their own answer do this
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
WEIGHTS: Mapping[str, Any] = {
    **TRAINING,
    "learning_rate": 4e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 64,
}
LORA: Mapping[str, Any] = {**WEIGHTS, "learning_rate": 8e-4}
CONCEPT: Mapping[str, Any] = {
    **TRAINING,
    "learning_rate": 3e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 128,
    "penalty_weight": 0.0,
}


def prompts(words: Sequence[str]) -> list[str]:
    """Return the prompt of each word."""
    return [DEFAULT_TEMPLATE.format(word) for word in words]


def names(dataset: Dataset, column: str) -> list[str]:
    """Return the names of the values of a column."""
    known = dataset.features[column].names
    return [known[value] for value in dataset.with_format(None)[column]]


def adults(faces: Dataset) -> Dataset:
    """Return the faces whose group is man or woman."""
    return faces.select([row for row, group in enumerate(names(faces, "group")) if group in GROUPS[:2]])


@dataclass(frozen=True)
class Data:
    """The images of one split.

    Attributes:
        faces: All faces.
        things: Other labelled images.
    """

    faces: Dataset
    things: Dataset

    @property
    def things_names(self) -> list[str]:
        """The class names of the things."""
        return list(self.things.features["label"].names)

    def kept(self, weight: float, people: Sequence[str]) -> list[Dataset]:
        """Return rows that keep the answers over people and things, on faces and on things."""
        texts = prompts([*people, *self.things_names])
        return [counterfactual_rows(rows, np.arange(len(rows)), texts, weight) for rows in (self.faces, self.things)]


def debiasing_rows(data: Data, occupations: Sequence[str], seed: int) -> Dataset:
    """Return rows that exchange what the model says of men and women, and rows that keep the rest.

    What is exchanged are the answers over all occupations, and over each of them, among everyday nouns.
    """
    grown, words = adults(data.faces), np.random.default_rng(seed)
    alike = [f"{race}, {age // 10}" for race, age in zip(names(grown, "race"), grown["age"], strict=True)]
    exchanged = []
    for draw, asked in enumerate([occupations, *([name] for name in occupations)]):
        texts = prompts([*asked, *words.choice(EVERYDAY_WORDS, NOUNS, replace=False)])
        targets = counterparts(grown["gender"], alike, seed + draw)
        exchanged.append(counterfactual_rows(grown, targets, texts))
    return concatenate_datasets([*exchanged, *data.kept(KEEP, GROUPS)])


def steering_rows(data: Data, seed: int) -> Dataset:
    """Return rows that exchange man and woman in part, within an age, and keep the rest."""
    faces, people = data.faces, prompts(GROUPS)
    grown = np.isin(names(faces, "group"), GROUPS[:2])
    alike = [
        f"{is_grown or group}, {age // 10}"
        for is_grown, group, age in zip(grown, names(faces, "group"), faces["age"], strict=True)
    ]
    turned = counterfactual_rows(faces, counterparts(faces["gender"], alike, seed), people, TURN)
    own = counterfactual_rows(faces, np.arange(len(faces)), people, 1 - TURN)
    return concatenate_datasets([turned, own, *data.kept(KEEP_STEERED, GROUPS[2:])])


def train(
    args: argparse.Namespace, processor: CLIPProcessor, rows: Dataset, settings: Mapping[str, Any], **how: Any
) -> Any:
    """Train the vision tower, adapters (`peft_config`) or a transformation (`concept`) on the rows."""
    common = {"seed": args.seed, "max_steps": args.max_steps, "use_cpu": args.bf16}
    trainer_class, config = ContrastivePOTrainer, ContrastivePOConfig
    if "concept" in how:
        trainer_class, config = ConceptTrainer, ConceptConfig
    else:
        common["bf16"] = args.bf16
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            load_model(args.model, attn_implementation="eager"),
            args=config(folder, **{**settings, **common}),
            train_dataset=rows,
            processing_class=processor,
            **how,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Judge:
    """Measures models on one split.

    Attributes:
        faces: The adults.
        bias: Evaluator of the occupations on them, by gender.
        kept: Accuracy on man or woman, on the four groups and on the things.
    """

    faces: Dataset
    bias: FairnessEvaluator
    kept: RetentionEvaluator

    def ndkl(self, models: Mapping[str, Any], occupations: Sequence[str]) -> dict[str, float]:
        """Return NDKL by gender over some occupations, by model."""
        asked = [OCCUPATIONS.index(name) for name in occupations]
        scores = {name: found[asked] for name, found in self.bias.measure(models, disable_tqdm=True).items()}
        found = fairness_report(scores, self.bias.groups, self.bias.ks, resamples=0)
        return {name: metrics["ndkl"].value for name, metrics in found.items()}

    def __call__(self, models: Mapping[str, Any], resamples: int) -> dict[str, dict[str, Estimate]]:
        """Return the columns of the table by model: skew and NDKL for each set of queries and each attribute."""
        scores, k = self.bias.measure(models, disable_tqdm=True), self.bias.ks[0]
        found: dict[str, dict[str, Estimate]] = {name: {} for name in models}
        for label, (groups, asked) in self.parts().items():
            part = {name: scores[name][asked] for name in models}
            report = fairness_report(part, groups, [k], base=BEFORE, resamples=resamples)
            for name, metrics in report.items():
                found[name] |= {f"{label}: {key}": estimate for key, estimate in metrics.items()}
        for name, metrics in self.kept(models, BEFORE, disable_tqdm=True).items():
            found[name] |= metrics
        return found

    def parts(self) -> dict[str, tuple[np.ndarray, slice]]:
        """Return groups and occupations of each pair of columns."""
        gender, race = self.bias.groups, np.array(names(self.faces, "race"))
        both = np.array([f"{first} {second}" for first, second in zip(race, gender, strict=True)])
        seen = len(SEEN)
        return {
            "all": (gender, slice(None)),
            "seen": (gender, slice(seen)),
            "never seen": (gender, slice(seen, None)),
            "race": (race, slice(None)),
            "race and gender": (both, slice(None)),
        }


def judge(data: Data, processor: CLIPProcessor, k: float, args: argparse.Namespace) -> Judge:
    """Return the evaluators of a split."""
    grown = adults(data.faces)
    gender = np.array(names(grown, "gender"))
    sets = {
        "man or woman": RetentionSet(grown, label_column="gender"),
        "groups": RetentionSet(data.faces, label_column="group"),
        "things": RetentionSet(data.things),
    }
    images = CleanImages(grown, "image", processor)
    bias = FairnessEvaluator(images, gender, OCCUPATIONS, [DEFAULT_TEMPLATE], [k], batch_size=args.batch_size)
    return Judge(grown, bias, RetentionEvaluator(sets, processor, args.batch_size, resamples=args.resamples))


def closed_forms(base: CLIPModel, processor: CLIPProcessor, faces: Dataset, batch_size: int) -> dict[str, CLIPModel]:
    """Return the base with each baseline folded in. They see all adults of the training split."""
    images = CleanImages(faces, "image", processor)
    with evaluating(base):
        table = collect_answers(
            images,
            lambda batch: encode_images(base, batch["pixel_values"]),
            base.config.projection_dim,
            batch_size,
            disable_tqdm=True,
            dtype=torch.float32,
        )
        people = encode_texts(base, processor, prompts(GROUPS[:2]))
        male, female = (
            encode_texts(base, processor, [f"a photo of a {name} {word}" for word in OCCUPATIONS])
            for name in GROUPS[:2]
        )
    embeds, gender = torch.from_numpy(table), names(faces, "gender")
    found = {
        "orthogonal projection": project_out_directions(people[:1] - people[1:]),
        "biased prompts": project_out_biased_prompts(people, male, female),
        "subspace projection": project_out_attribute(embeds, gender),
        "feature clipping": drop_informative_features(embeds, gender, min(DROPPED, embeds.shape[1] // 2)),
    }
    return {name: transform.fold_into(base) for name, transform in found.items()}


def trained(
    args: argparse.Namespace, processor: CLIPProcessor, data: Data, base: CLIPModel, left_out: Judge
) -> tuple[dict[str, CLIPModel], dict[str, list[float]]]:
    """Return the chosen model of each way of training, and NDKL at each step on the faces left out."""
    everything = ContrastivePOConfig("lora", use_cpu=True)
    found: dict[str, CLIPModel] = {}
    curves: dict[str, list[float]] = {}
    for occupations in (OCCUPATIONS, SEEN):
        rows = debiasing_rows(data, occupations, args.seed)
        for way in args.ways:
            log(f"{way}, {len(occupations)} occupations, {len(rows)} rows")
            if way == "W":
                concept = train(args, processor, rows, CONCEPT, concept=ConceptTransform(base.config.projection_dim))
                models = {step: concept.fold_into(base, step) for step in STEPS}
            else:
                peft = adapters(ModelConfig(use_peft=True), base, everything) if way == "LoRA" else None
                model = train(args, processor, rows, LORA if way == "LoRA" else WEIGHTS, peft_config=peft)
                models = {step: interpolate(base, model, step) for step in STEPS}
            by_step = left_out.ndkl({f"{step:g}": model for step, model in models.items()}, occupations)
            best = min(STEPS, key=lambda step: by_step[f"{step:g}"])
            name = f"{way}, {len(occupations)} occupations"
            found[f"{name}: {'t =' if way == 'W' else 'share'} {best:g}"] = models[best]
            curves[name] = list(by_step.values())
    return found, curves


def by_age(group: np.ndarray) -> np.ndarray:
    """Return child, elder or neither from positions in `GROUPS`."""
    return np.maximum(group, 1)


def neutral_scale(base: CLIPModel, concept: ConceptTransform, left_out: Judge) -> float:
    """Return the scale with man-or-woman accuracy closest to .5 on faces left out."""
    models = {f"{t:g}": concept.fold_into(base, t, "straight") for t in np.arange(1, 40) / 10}
    name = "man or woman"
    one = RetentionEvaluator({name: left_out.kept.sets[name]}, left_out.kept.processor, left_out.kept.batch_size)
    found = one.report(one.measure(models, disable_tqdm=True), None, 1)
    return float(min(models, key=lambda t: abs(found[t]["accuracy"].value - 0.5)))


def steering(
    args: argparse.Namespace,
    processor: CLIPProcessor,
    data: Data,
    base: CLIPModel,
    left_out: Judge,
    kept: RetentionEvaluator,
) -> dict[float, dict[str, Estimate]]:
    """Return accuracies and costs by scale of a W of the images on the straight path, the neutral one included."""
    log("steering")
    concept = ConceptTransform(base.config.projection_dim, towers="image")
    concept = train(args, processor, steering_rows(data, args.seed), CONCEPT, concept=concept)
    scales = sorted({*SCALES, neutral_scale(base, concept, left_out)})
    models = {BEFORE: base, **{f"{t:g}": concept.fold_into(base, t, "straight") for t in scales}}
    measured = kept.measure(models, disable_tqdm=True)
    folded = {name: {**answers, "groups": by_age(answers["groups"])} for name, answers in measured.items()}
    kept.label["groups"] = by_age(kept.label["groups"])
    found = kept.report(folded, BEFORE, args.resamples)
    return {t: found[f"{t:g}"] for t in scales}


def log(text: str) -> None:
    """Print progress to standard error. Only the tables go to standard output."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLIPModel")
    parser.add_argument("--faces", required=True, help="faces with gender, group, race and age, folder or Hub id")
    parser.add_argument("--things", required=True, help="other labelled images, folder or Hub id")
    parser.add_argument("--left_out", type=float, default=0.4, help="share of the training faces for choosing")
    parser.add_argument("--things_rows", type=int, default=2200, help="things in training")
    parser.add_argument("--ways", nargs="+", default=["full", "LoRA", "W"], choices=["full", "LoRA", "W"])
    parser.add_argument("--k", type=int, default=100, help="number of top-ranked images")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop every training after this many steps")
    parser.add_argument("--bf16", action="store_true", help="train weights in bf16 on the CPU")
    parser.add_argument("--batch_size", type=int, default=250, help="images per forward pass outside training")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args()
    start = time.time()
    logging.disable_progress_bar()
    disable_progress_bars()
    processor = CLIPProcessor.from_pretrained(args.model)
    base = load_model(args.model).eval()
    faces, things = (load_split(source, "train") for source in (args.faces, args.things))
    split = round((1 - args.left_out) * len(faces))
    data = Data(faces.select(range(split)), things.select(range(min(args.things_rows, len(things)))))
    rest = Data(faces.select(range(split, len(faces))), data.things)
    test = Data(load_split(args.faces, "test"), load_split(args.things, "test"))
    tested, left_out = (judge(part, processor, k, args) for part, k in ((test, args.k), (rest, 0.2)))
    models, curves = trained(args, processor, data, base, left_out)
    models = {BEFORE: base, **models, **closed_forms(base, processor, adults(faces), args.batch_size)}
    log("measuring")
    k = tested.bias.ks[0]
    chance = {label: chance_level(groups, [k]) for label, (groups, _) in tested.parts().items()}
    print(bias_tables(tested(models, args.resamples), k, chance))
    steered = steering(args, processor, data, base, left_out, tested.kept)
    print(f"\n{steering_table(steered)}")
    if args.plots is not None:
        draw_plots(args.plots, STEPS, curves, steered)
    log(f"{len(tested.faces)} adults, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
