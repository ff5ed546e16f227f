"""Models and images of clip-po steer: the embedded digits, or a labelled dataset of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli.arguments import Task
from clip_po.cli.steer_arguments import SteerArguments
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.models import load_model, read_processor

TRAIN_RENDERINGS, RENDERINGS = 6, 10
"""Renderings of each embedded digit, for training and for measuring."""


@dataclass(frozen=True)
class Case:
    """A model with the images it is steered on.

    Attributes:
        model: The model.
        processor: The processor of the model.
        task: Class names and prompt template.
        train: Preferences to train on.
        validation: Images to choose t on.
        test: Images to measure on, with attacks in the style of the training.
        unseen: The test images in fonts that the training does not use. None if the user names fonts.
        about: Description of the data for the report.
    """

    model: CLIPModel
    processor: CLIPProcessor
    task: Task
    train: TypographicPreferences
    validation: RobustnessImages
    test: RobustnessImages
    unseen: RobustnessImages | None
    about: Mapping[str, Any]


def digits_case(args: SteerArguments, seed: int) -> Case:
    """Load the embedded model and its digits."""
    model, processor = load_model(str(MODEL_PATH)), CLIPProcessor.from_pretrained(MODEL_PATH)
    renderings = args.renderings or RENDERINGS
    train, others = (
        load_digits_dataset("train", times, seed + number)
        for number, times in enumerate((TRAIN_RENDERINGS, -(-renderings // 2)))
    )
    # Training W needs few digits, choosing t needs many: half of the training digits are used for validation.
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
    """Load the model and the dataset that the arguments name."""
    model = load_model(str(args.model_name_or_path))
    processor = read_processor(str(args.model_name_or_path))
    train = args.load(args.dataset_train_split, seed)
    test = args.load(args.dataset_test_split, seed, like=train)
    known = Task.load(str(args.model_name_or_path))
    names = args.names(train, known)
    (template,) = args.templates(known)
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
        Task.of(names, template, args.dataset_names(train)),
        TypographicPreferences(train, own, names, template, image_column, label_column),
        images(validation, attack(training_fonts(), seed + 1)),
        images(test, attack(training_fonts(), seed + 2)),
        None if args.attack_fonts else images(test, attack(unseen_fonts(), seed + 2)),
        {"name": args.dataset_name, "split": args.dataset_test_split, "rows": len(test), "class_names": names},
    )


def held_out(args: SteerArguments, train: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Return training and validation rows. Without a validation split, a tenth of the training rows is held out.

    Raises:
        ValueError: If there are fewer than ten training rows and no validation split.
    """
    if args.dataset_validation_split is not None:
        return train, args.load(args.dataset_validation_split, seed, like=train)
    if len(train) < 10:
        raise ValueError(
            f"A tenth of the {len(train)} training rows is too little to choose t on. Give ten rows or more, or a "
            "--dataset_validation_split."
        )
    split = train.train_test_split(test_size=0.1, seed=seed)
    return split["train"], split["test"]


def fixed(attack: TypographicAttack) -> TypographicAttack:
    """Return the attack with the same pixels in every epoch, so that each image is embedded only once."""
    return replace(attack, redraw="never")
