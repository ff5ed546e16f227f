"""Everything that a comparison needs, loaded before the first method runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_po.cli.compare_arguments import CompareArguments, Recipe
from clip_po.cli.compare_methods import DETERMINISTIC_METHODS, ComparisonSetup, check_model
from clip_po.cli.compare_retention import OtherTasks
from clip_po.cli.retention_sets import load_retention_sets
from clip_po.data.attacks.fonts import training_fonts, unseen_fonts
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.comparison import ComparisonResults
from clip_po.evaluation.robustness import BLANK, VARIANTS, RobustnessImages
from clip_po.models import read_processor

BASE = "before"
"""Name of the model before alignment, in tables and folders."""

SHARED_FLAGS = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_validation_split",
    "image_column",
    "label_column",
    "max_samples",
    "attack_words",
    "attack_other_words",
    "attack_other_share",
    "attack_count",
    "name_until",
    "attack_size",
    "attack_places",
    "attack_rotation",
    "attack_sticker",
)
"""Flags that are passed on to `clip-po train`."""


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison needs.

    Attributes:
        args: The flags.
        recipe: The methods and attacks.
        setup: The model and data that every method starts from.
        images: The test images, by attack.
        tasks: The retention sets.
        results: The stored answers.
    """

    args: CompareArguments
    recipe: Recipe
    setup: ComparisonSetup
    images: Mapping[str, RobustnessImages]
    tasks: OtherTasks
    results: ComparisonResults

    @property
    def main_attack(self) -> str:
        """Return the first attack, which gives recovery and the choice of the best method."""
        return next(iter(self.images))

    def runs(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """Yield every run, one seed after another.

        Yields:
            Name, seed and settings of a method.
        """
        for seed in self.args.seeds:
            for name, settings in self.recipe.methods.items():
                if settings.get("method") not in DETERMINISTIC_METHODS or seed == self.args.seeds[0]:
                    yield name, seed, settings

    def seeds(self, method: str) -> list[int]:
        """Return the seeds that a method runs with.

        Args:
            method: Name of the method in the recipe.

        Returns:
            The seeds, in the order of the flag.
        """
        return [seed for name, seed, _ in self.runs() if name == method]

    def answers(self, method: str, attack: str) -> list[dict[str, np.ndarray]]:
        """Return the stored answers of a method under an attack.

        Args:
            method: Name of the method in the recipe, or `BASE`.
            attack: Name of the attack.

        Returns:
            For each seed, array [N] of predicted classes by variant.
        """
        return [self.results.answers(method, seed, attack) for seed in self.stored_seeds(method)]

    def other_tasks(self, method: str) -> list[dict[str, dict[str, np.ndarray]]]:
        """Return what is stored of a method about other tasks.

        Args:
            method: Name of the method in the recipe, or `BASE`.

        Returns:
            For each seed, arrays by retention set and name.
        """
        return [self.results.other_tasks(method, seed) for seed in self.stored_seeds(method)]

    def stored_seeds(self, method: str) -> list[int]:
        """Return the seeds under which the results of a method are stored.

        Args:
            method: Name of the method in the recipe, or `BASE`, which is stored under seed 0.

        Returns:
            The seeds.
        """
        return [0] if method == BASE else self.seeds(method)


def load(args: CompareArguments, recipe: Recipe) -> Comparison:
    """Load the processor and the data, and open the folder of results.

    Args:
        args: The flags.
        recipe: The methods and attacks.

    Returns:
        The comparison.
    """
    setup = _load_setup(args, recipe)
    check_model(setup.model, [settings.get("method", "train") for settings in recipe.methods.values()])
    images = _load_test_images(args, recipe, setup)
    count = args.max_test_samples
    sets = load_retention_sets(args.retention or [], [setup.template])
    few = {name: loaded if count is None else loaded.sample(count, seed=0) for name, loaded in sets.items()}
    tasks = OtherTasks(setup, few, open_vocabulary(setup.template, setup.class_names))
    settings = {"training": recipe.training, "attacks": recipe.attacks, **args.measurement_settings()}
    return Comparison(args, recipe, setup, images, tasks, ComparisonResults(setup.folder, settings))


def _load_setup(args: CompareArguments, recipe: Recipe) -> ComparisonSetup:
    """Load the processor, the training split and the validation split."""
    processor = read_processor(str(args.model_name_or_path))
    dataset = args.load(args.dataset_train_split, 0)
    names = args.names(dataset)
    (template,) = args.templates()
    shared = {name: getattr(args, name) for name in SHARED_FLAGS}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    quiet["overwrite_output_dir"] = True  # of a run that was stopped: a finished one is not run again
    own = {"model_name_or_path": args.model_name_or_path, "class_names": names, "prompt_template": template}
    return ComparisonSetup(
        model=str(args.model_name_or_path),
        processor=processor,
        train=dataset,
        validation=args.load(str(args.dataset_validation_split), 0, like=dataset),
        class_names=names,
        template=template,
        image_column=args.image_column,
        label_column=args.label_column,
        attack=lambda seed: args.attack(names, training_fonts(), processor, seed),
        training={**shared, **own, **quiet, **recipe.training},
        folder=Path(str(args.output_dir)),
        batch_size=args.batch_size,
    )


def _load_test_images(args: CompareArguments, recipe: Recipe, setup: ComparisonSetup) -> dict[str, RobustnessImages]:
    """Load the test images for each attack, in fonts unseen in training; the main attack adds the blank box."""
    dataset = replace(args, max_samples=args.max_test_samples).load(args.dataset_test_split, 0, like=setup.train)
    attack = args.attack(setup.class_names, unseen_fonts(), setup.processor, args.test_seed)
    images: dict[str, RobustnessImages] = {}
    for name, settings in recipe.attacks.items():
        images[name] = RobustnessImages(
            dataset,
            replace(attack, **settings),
            setup.processor,
            setup.class_names,
            image_column=args.image_column,
            label_column=args.label_column,
            renderings=args.renderings,
            variants=VARIANTS if images else (*VARIANTS, BLANK),
            keep_bytes=2**30,
        )
    return images
