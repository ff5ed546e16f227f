"""clip-po steer: one number from reading the words on images to seeing what the images show."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from transformers import CLIPModel, CLIPProcessor
from trl import TrlParser

from clip_po.cli.arguments import DEFAULT_TEMPLATE, Task, TaskArguments, parse_flags
from clip_po.concept.sweep import (
    SCALES,
    ScalePoint,
    VariantEmbeddings,
    choose_neutral,
    choose_within,
    embed_variants,
    scale_table,
    sweep_scales,
)
from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import CONCEPT_FILE, ConceptTransform, ScalePath
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic import TypographicPreferences
from clip_po.evaluation.interpolation import check_bound
from clip_po.evaluation.report.figures import save_figure
from clip_po.evaluation.report.plots import sweep_plot
from clip_po.evaluation.report.report_file import write_report
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_estimate
from clip_po.models import load_model
from clip_po.validation import check_writable

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
"""Defaults of the training, found on digits: there DPO and KTO, of all losses, fell with t on both sides of 0."""

TRAIN_RENDERINGS, RENDERINGS = 6, 10
"""How often each digit of the embedded data set is drawn: to train, and to measure."""


@dataclass
class SteerArguments(TaskArguments):
    """Arguments of `clip-po steer` beside those of the trainer."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or the folder of a CLIPModel; default: the demo's, with its digits."}
    )
    t: list[float] = field(default_factory=lambda: list(SCALES), metadata={"help": "Scales of the table."})
    choose: Literal["neutral", "at_most"] = field(
        default="neutral",
        metadata={
            "help": "The t that is saved, chosen on validation images: neutral, where the written word's answers and "
            "the right ones meet; at_most, where it reads least at a clean cost of at most max_clean_cost.",
        },
    )
    max_clean_cost: float = field(
        default=0.5, metadata={"help": "Clean accuracy that may be lost, in points, for choose=at_most."}
    )
    path: Literal["singular", "straight"] | None = field(
        default=None,
        metadata={
            "help": "How W is scaled: singular, U S^t V^T; straight, (1 - t) I + t W; default: singular for one W of "
            "both towers, else straight.",
        },
    )
    towers: Literal["shared", "each", "image"] = field(
        default="shared", metadata={"help": "One W for both towers, one for each, or one for images alone."}
    )
    transform: str | None = field(
        default=None,
        metadata={"help": "Folder of a trained transformation (an earlier output_dir), to be used without training."},
    )
    renderings: int | None = field(
        default=None,
        metadata={"help": "How often each image is attacked to choose and to measure; default: 1, digits 5 and 10."},
    )
    dataset_validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to choose t on; default: a tenth of the training rows, kept out of them."},
    )

    def __post_init__(self) -> None:
        """Refuse what can't work before anything is loaded."""
        if (self.dataset_name is None) != (self.model_name_or_path is None):
            missing = "--dataset_name" if self.dataset_name is None else "--model_name_or_path"
            raise ValueError(f"{missing} is missing: give model and data set, or neither for the embedded digits.")
        self.check()
        check_bound(self.max_clean_cost)
        if not self.t or not all(math.isfinite(t) for t in self.t):
            raise ValueError(f"--t takes finite numbers, at least one, got {self.t}; --t -1 0 0.5 1 will do.")
        if self.renderings is not None and self.renderings < 1:
            raise ValueError(f"--renderings must be at least 1, got {self.renderings}.")


@dataclass(frozen=True)
class Case:
    """A model with the images that it is steered on.

    Attributes:
        model: The model.
        processor: Its processor.
        task: Class names and prompt.
        train: Preferences to train on.
        validation: Images to choose t on.
        test: Images to measure on, in the style of the training's attack.
        unseen: The same images in fonts that the training's attack does not have; None where the user names fonts.
        about: What a report says of the data.
    """

    model: CLIPModel
    processor: CLIPProcessor
    task: Task
    train: TypographicPreferences
    validation: RobustnessImages
    test: RobustnessImages
    unseen: RobustnessImages | None
    about: Mapping[str, Any]


def parse(argv: Sequence[str]) -> tuple[SteerArguments, ConceptConfig]:
    """The arguments: flags over YAML (`--config`) over `DEFAULTS`."""
    parser = TrlParser([SteerArguments, ConceptConfig], prog="clip-po steer")
    parser.set_defaults_with_config(**DEFAULTS)
    args, config = parse_flags(parser, argv)
    return args, config


def digits_case(args: SteerArguments, seed: int) -> Case:
    """The embedded model and its digits."""
    model, processor = load_model(str(MODEL_PATH)), CLIPProcessor.from_pretrained(MODEL_PATH)
    renderings = args.renderings or RENDERINGS
    train, others = (
        load_digits_dataset("train", times, seed + number)
        for number, times in enumerate((TRAIN_RENDERINGS, -(-renderings // 2)))
    )
    # A transformation needs few digits, a choice needs many: half of those of training join the validation's.
    train = train.filter(lambda digit: digit % 2 == 0, input_columns="digit")
    others = others.filter(lambda digit: digit % 2 == 1, input_columns="digit")
    validation = concatenate_datasets([others, load_digits_dataset("validation", -(-renderings // 2), seed + 1)])
    test = load_digits_dataset("test", renderings, seed + 2)

    def images(rows: Dataset, attack: TypographicAttack) -> RobustnessImages:
        return RobustnessImages(rows, attack, processor, DIGIT_NAMES, cluster_column="digit")

    return Case(
        model,
        processor,
        Task(DIGIT_NAMES, PROMPT_TEMPLATE),
        TypographicPreferences(train, fixed(digit_attack("training", seed)), DIGIT_NAMES, PROMPT_TEMPLATE),
        images(validation, digit_attack("training", seed + 1)),
        images(test, digit_attack("training", seed + 2)),
        images(test, digit_attack("unseen", seed + 2)),
        {"name": "digits", "split": "test", "rows": len(test), "class_names": DIGIT_NAMES},
    )


def labelled_case(args: SteerArguments, seed: int) -> Case:
    """A model and a data set of the user's."""
    model = load_model(str(args.model_name_or_path))
    processor = CLIPProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    train, test = args.load(args.dataset_train_split, seed), args.load(args.dataset_test_split, seed)
    known = Task.load(str(args.model_name_or_path))
    names = args.names(train, known)
    template = args.prompt_template or (known.prompt_template if known else DEFAULT_TEMPLATE)
    train, validation = held_out(args, train, seed)
    image_column, label_column = args.image_column, args.label_column

    def attack(fonts: Sequence[str], seed: int) -> TypographicAttack:
        return args.attack(names, fonts, processor, seed)

    def images(rows: Dataset, attack: TypographicAttack) -> RobustnessImages:
        return RobustnessImages(
            rows,
            attack,
            processor,
            names,
            image_column=image_column,
            label_column=label_column,
            renderings=args.renderings or 1,
        )

    own = fixed(attack(training_fonts(), seed))

    return Case(
        model,
        processor,
        Task(names, template),
        TypographicPreferences(train, own, names, template, image_column, label_column),
        images(validation, attack(training_fonts(), seed + 1)),
        images(test, attack(training_fonts(), seed + 2)),
        None if args.attack_fonts else images(test, attack(unseen_fonts(), seed + 2)),
        {"name": args.dataset_name, "split": args.dataset_test_split, "rows": len(test), "class_names": names},
    )


def held_out(args: SteerArguments, train: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Training and validation rows: those of the validation split, or a tenth of the training rows."""
    if args.dataset_validation_split is not None:
        return train, args.load(args.dataset_validation_split, seed)
    if len(train) < 10:
        raise ValueError(
            f"A tenth of the {len(train)} training rows is too little to choose t on. Give ten or more, or "
            "--dataset_validation_split."
        )
    split = train.train_test_split(test_size=0.1, seed=seed)
    return split["train"], split["test"]


def fixed(attack: TypographicAttack) -> TypographicAttack:
    """The attack with the same pixels in every epoch, so that each image is embedded once."""
    return replace(attack, redraw="never")


def concept_trainer(case: Case, transform: ConceptTransform, config: ConceptConfig) -> ConceptTrainer:
    """The trainer of W."""
    return ConceptTrainer(
        case.model,
        transform,
        args=config,
        train_dataset=case.train,
        processing_class=case.processor,
        candidate_texts=case.train.all_texts,
    )


def choose_scale(
    args: SteerArguments, validation: VariantEmbeddings, transform: ConceptTransform, path: ScalePath
) -> ScalePoint:
    """The t that the arguments ask for, on a grid of tenths between the lowest and the highest --t.

    The neutral one is looked for in hundredths around it: accuracy moves by points between tenths.
    """
    tenths = range(math.ceil(10 * min(args.t)), math.floor(10 * max(args.t)) + 1)
    grid = sorted({*args.t, *(tenth / 10 for tenth in tenths)})
    if args.choose == "at_most":
        return choose_within(sweep_scales(validation, transform, grid, path), args.max_clean_cost)
    # Where they meet is asked of the values alone.
    near = choose_neutral(sweep_scales(validation, transform, grid, path, resamples=1)).t
    hundredths = [round(near + hundredth / 100, 4) for hundredth in range(-10, 11)]
    inside = [t for t in hundredths if grid[0] <= t <= grid[-1]]
    return choose_neutral(sweep_scales(validation, transform, inside, path, resamples=1))


def meeting_point(
    args: SteerArguments, test: VariantEmbeddings, transform: ConceptTransform, path: ScalePath
) -> ScalePoint | None:
    """Where the answers meet on the images that are measured: how far off a choice on others was, and no choice."""
    try:
        return choose_scale(args, test, transform, path)
    except ValueError:  # they don't meet on these
        return None


def main(argv: Sequence[str]) -> None:
    """Train, choose, sweep; print the table, and write report, curve, transformation and folded checkpoint."""
    args, config = parse(argv)
    if config.should_save:
        check_writable(config.output_dir, "--output_dir")
    start = time.time()
    case = (digits_case if args.dataset_name is None else labelled_case)(args, config.seed)
    folder = Path(str(config.output_dir))
    if args.transform is not None:
        transform, accelerator = ConceptTransform.load(args.transform), Accelerator(cpu=config.use_cpu)
        case.model.to(accelerator.device)
    else:
        transform = ConceptTransform(case.model.config.projection_dim, towers=args.towers)
        trainer = concept_trainer(case, transform, config)
        trainer.train()
        accelerator = trainer.accelerator
        if accelerator.is_main_process:
            transform.save(folder)
    transform.cpu()

    def embedded(images: RobustnessImages) -> VariantEmbeddings:
        return embed_variants(
            case.model,
            images,
            [case.task.prompt_template],
            batch_size=config.per_device_eval_batch_size,
            num_workers=config.dataloader_num_workers,
            accelerator=accelerator,
            disable_tqdm=bool(config.disable_tqdm),
        )

    path: ScalePath = args.path or ("singular" if transform.towers == "shared" else "straight")
    chosen = choose_scale(args, embedded(case.validation), transform, path).t
    ts = sorted({*args.t, chosen})
    measured = embedded(case.test)
    points = sweep_scales(measured, transform, ts, path)
    oracle = meeting_point(args, measured, transform, path) if args.choose == "neutral" else None
    elsewhere = [] if case.unseen is None else sweep_scales(embedded(case.unseen), transform, ts, path)
    if not accelerator.is_main_process:
        return
    if args.transform is not None:
        transform.save(folder)
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    transform.fold_into(case.model, chosen, path).save_pretrained(checkpoint)
    case.processor.save_pretrained(checkpoint)
    case.task.save(checkpoint)
    curves = {
        "right": [point.right for point in points],
        "reading": [point.reading for point in points],
        "clean": [point.clean_accuracy for point in points],
    }
    curve = save_figure(sweep_plot(ts, curves, xlabel="scale t", chosen=chosen), folder / "curve.png")
    training = {name: getattr(config, name) for name in (*DEFAULTS, "seed")}
    seconds = time.time() - start
    report = write_report(
        folder / "report.json",
        command="steer",
        models={
            **{f"t={point.t:g}": point.metrics() for point in points},
            **{f"t={point.t:g}, unseen fonts": point.metrics() for point in elsewhere},
        },
        settings={
            **asdict(args),
            "path": path,
            "towers": transform.towers,
            "chosen": chosen,
            "meets_at": None if oracle is None else oracle.t,
            "training": training,
        },
        data=case.about,
        seconds=seconds,
    )
    print(f"{len(case.test)} typographic images; in brackets 95% intervals:\n")
    print(scale_table({f"{point.t:g}": point for point in points}))
    print(f"\nChosen on {len(case.validation)} validation images ({args.choose}): t = {chosen:g}. {seconds:.0f} s.")
    if oracle is not None:
        apart = f"{oracle.difference.value:.1f} points apart"
        print(f"On the images measured themselves the two answers meet at t = {oracle.t:g}, {apart}.")
    for point in (point for point in elsewhere if point.t == chosen):
        found = f"reading {format_estimate(point.reading)}, right {format_estimate(point.right)}"
        print(f"The same t on the words of an attack that training did not see: {found}.")
    print(f"W:          {folder / CONCEPT_FILE}\nCheckpoint: {checkpoint}\nReport:     {report}\nCurve:      {curve}")
