"""The methods that `clip-po compare` can run, by the name that a recipe gives them in `method:`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from clip_po.baselines.clip_layers import clip_model
from clip_po.baselines.defense_prefix import learn_prefix, prefix_class_embeddings
from clip_po.baselines.head_ablation import ablate_reading_heads
from clip_po.baselines.mirror_mask import mask_by_mirror
from clip_po.baselines.spelling_projection import learn_spelling_projection
from clip_po.baselines.text_removal import TextRemoval, processor_without_text
from clip_po.cli import train
from clip_po.cli.arguments import DEFAULT_TEMPLATE
from clip_po.cli.flags import similar_names
from clip_po.cli.promise import check_bounds, cost_measures, load_promised_sets
from clip_po.concept.folding import check_foldable
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.bounds import Bounds
from clip_po.evaluation.interpolation import ALPHAS, choose_alpha, interpolate, sweep_interpolation
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.models import load_any


@dataclass(frozen=True)
class MethodResult:
    """A model made by one method with one seed, ready to be evaluated.

    Attributes:
        model: The model.
        processor: Its processor.
        class_embeds: Tensor[C, D], unit-norm class embeddings; None to encode the class names with the prompt
            template.
        details: What the method selected or learned, for the report.
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    class_embeds: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonSetup:
    """The model and data that every method starts from.

    Attributes:
        model: Folder or Hub id of the model.
        processor: Its processor.
        train: Labelled images to train on.
        validation: Labelled images to select settings on.
        class_names: Class names in the order of the labels.
        template: Prompt of a class, with one `{}`.
        image_column: Column of images.
        label_column: Column of labels.
        attack: Function that returns the training attack for a seed.
        training: Flags of `clip-po train` shared by all trained methods: data, columns and schedule.
        folder: Folder with one subfolder per method, and in each one subfolder per seed.
        batch_size: Number of images in a forward pass without training.
    """

    model: str
    processor: ProcessorMixin
    train: Dataset
    validation: Dataset
    class_names: list[str]
    template: str
    image_column: str
    label_column: str
    attack: Callable[[int], TypographicAttack]
    training: Mapping[str, Any]
    folder: Path
    batch_size: int

    def load_base(self) -> PreTrainedModel | PeftModel:
        """Load the model before alignment.

        Returns:
            The model, a new copy for each call.
        """
        return load_any(self.model)

    def checkpoint(self, method: str, seed: int) -> Path:
        """Return the checkpoint folder of a trained method.

        Args:
            method: Name of the method in the recipe.
            seed: Its seed.

        Returns:
            The folder.
        """
        return self.folder / method / f"seed-{seed}" / "checkpoint"

    def preferences(self, seed: int) -> TypographicPreferences:
        """Return the training images with the training attack.

        Args:
            seed: Seed of the method.

        Returns:
            The preferences.
        """
        return TypographicPreferences(
            self.train,
            self.attack(seed),
            self.class_names,
            self.template,
            self.image_column,
            self.label_column,
        )

    def validation_images(self, seed: int) -> RobustnessImages:
        """Return the validation images with the training attack.

        Args:
            seed: Seed of the method. The attack is drawn with the next seed, which differs from training.

        Returns:
            The images.
        """
        return RobustnessImages(
            self.validation,
            self.attack(seed + 1),
            self.processor,
            self.class_names,
            image_column=self.image_column,
            label_column=self.label_column,
            keep_bytes=2**30,
        )


def _to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags, without those that are None."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, (bool, dict)) else str(v) for v in values)]
    return words


def _run_training(setup: ComparisonSetup, name: str, seed: int, **settings: Any) -> MethodResult:
    """Run `clip-po train` with the given flags.

    Source: Afzali et al. 2025, arXiv 2411.08923.
    """
    folder = str(setup.checkpoint(name, seed))
    given = {**setup.training, **settings, "seed": seed, "output_dir": folder}
    trainer, task = train.align(*train.parse(_to_flags(given)))
    train.save(trainer, task)
    return MethodResult(trainer.model, setup.processor, details={"learning_rate": trainer.args.learning_rate})


def _run_interpolation(
    setup: ComparisonSetup,
    name: str,
    seed: int,
    of: str,
    max_clean_cost: float | None = 0.5,
    max_drift: float | None = None,
    max_retention_cost: float | None = None,
    retention: Sequence[str] | None = None,
) -> MethodResult:
    """Interpolate between the base and the checkpoint of method `of`, with alpha selected on validation images.

    Source: Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903; Ilharco et al. 2022 (PAINT), arXiv 2208.05592.
    """
    base, aligned = setup.load_base(), load_any(str(setup.checkpoint(of, seed)))
    bounds = Bounds(max_clean_cost, max_drift, max_retention_cost)
    measures = cost_measures(
        bounds,
        setup.validation,
        setup.image_column,
        open_vocabulary(setup.template, setup.class_names),
        load_promised_sets(retention, [setup.template]),
        processor=setup.processor,
        batch_size=setup.batch_size,
    )
    points = sweep_interpolation(
        base,
        aligned,
        setup.validation_images(seed),
        [setup.template],
        ALPHAS,
        measures=measures,
        batch_size=setup.batch_size,
        disable_tqdm=True,
    )
    choice = choose_alpha(points, bounds)
    model = interpolate(base, aligned, choice.point.alpha)
    return MethodResult(model, setup.processor, details={"alpha": choice.point.alpha, "choice": choice.describe()})


def _run_head_ablation(setup: ComparisonSetup, name: str, seed: int, **settings: Any) -> MethodResult:
    """Silence the attention heads that read words, selected on validation images.

    Source: Hufe et al. 2025 (Dyslexify), arXiv 2508.20570.
    """
    found = ablate_reading_heads(
        setup.load_base(),
        setup.validation_images(seed),
        [setup.template],
        batch_size=setup.batch_size,
        **settings,
    )
    return MethodResult(found.model, setup.processor, details={"heads": found.heads})


def _run_text_removal(setup: ComparisonSetup, name: str, seed: int, **settings: Any) -> MethodResult:
    """Detect text in each image and fill it in before the model sees the image."""
    return MethodResult(setup.load_base(), processor_without_text(setup.processor, TextRemoval(**settings)))


def _run_defense_prefix(setup: ComparisonSetup, name: str, seed: int, **settings: Any) -> MethodResult:
    """Learn a token that goes before the class name in every prompt.

    Source: Azuma and Matsui 2023 (Defense-Prefix), arXiv 2304.04512.
    """
    model = setup.load_base()
    prefix = learn_prefix(model, setup.processor, setup.preferences(seed), seed=seed, disable_tqdm=True, **settings)
    embeds = prefix_class_embeddings(model, setup.processor, prefix, setup.class_names, [setup.template])
    return MethodResult(model, setup.processor, embeds)


def _run_mirror_mask(setup: ComparisonSetup, name: str, seed: int) -> MethodResult:
    """Keep the part of an image's embedding on which its mirror image agrees.

    Source: Wang et al. 2024 (MirrorCLIP), NeurIPS 2024.
    """
    return MethodResult(mask_by_mirror(setup.load_base()), setup.processor)


def _run_spelling_projection(setup: ComparisonSetup, name: str, seed: int, **settings: Any) -> MethodResult:
    """Learn a projection of both towers' embeddings that forgets to spell.

    Source: Materzynska et al. 2022, arXiv 2206.07835.
    """
    model = setup.load_base()
    projection = learn_spelling_projection(
        model, setup.processor, setup.preferences(seed), seed=seed, disable_tqdm=True, **settings
    )
    return MethodResult(projection.fold_into(model), setup.processor, details={"output_dim": projection.output_dim})


METHODS: Mapping[str, Callable[..., MethodResult]] = {
    "train": _run_training,
    "interpolation": _run_interpolation,
    "head_ablation": _run_head_ablation,
    "text_removal": _run_text_removal,
    "defense_prefix": _run_defense_prefix,
    "mirror_mask": _run_mirror_mask,
    "spelling_projection": _run_spelling_projection,
}
"""Values of `method:` in a recipe. The default is `train`."""


def _settings_of(function: Callable[..., Any], *given: str) -> list[str]:
    """Return the parameters of a function that a recipe can set, which are not given by the method itself."""
    return [name for name in inspect.signature(function).parameters if name not in given]


SETTINGS: Mapping[str, list[str]] = {
    "interpolation": _settings_of(_run_interpolation, "setup", "name", "seed"),
    "head_ablation": _settings_of(ablate_reading_heads, "model", "images", "templates", "silence", "batch_size"),
    "text_removal": _settings_of(TextRemoval),
    "defense_prefix": _settings_of(learn_prefix, "model", "processor", "preferences", "seed", "disable_tqdm"),
    "mirror_mask": [],
    "spelling_projection": _settings_of(
        learn_spelling_projection, "model", "processor", "preferences", "seed", "disable_tqdm"
    ),
}
"""Names of the settings of a method. Those of `train` are flags."""

CLIP_METHODS: Mapping[str, Callable[[PreTrainedModel | PeftModel, str], Any]] = {
    **dict.fromkeys(("head_ablation", "defense_prefix", "mirror_mask"), clip_model),
    "spelling_projection": lambda model, method: check_foldable(model),
}
"""Checks of the model that a method takes, of those that do not take every two-tower model."""

DETERMINISTIC_METHODS = frozenset({"text_removal", "mirror_mask"})
"""Methods that draw nothing at random and therefore run with one seed only."""


def check_settings(shared: Mapping[str, Any], method: str = "train", **settings: Any) -> None:
    """Raise if a method can't run with its settings, before any method has run.

    Args:
        shared: Flags of `clip-po train` shared by all trained methods.
        method: One of `METHODS`.
        **settings: Arguments of the method.

    Raises:
        ValueError, TypeError: If a setting is unknown or, for `train` and bounds, its value is invalid; if a retention
            set can't be loaded.
    """
    if method == "train":
        train.parse(_to_flags({**shared, **settings}))
        return
    for name in settings:
        if name not in SETTINGS[method]:
            meant = " or ".join(similar_names(name, SETTINGS[method]))
            raise ValueError(f"{method} has no setting {name!r}." + (f" Did you mean {meant}?" if meant else ""))
    if method == "interpolation":
        retention = settings.get("retention")
        check_bounds(Bounds(**{name: bound for name, bound in settings.items() if name.startswith("max_")}), retention)
        load_promised_sets(retention, [DEFAULT_TEMPLATE])


def check_model(model: str, methods: Iterable[str]) -> None:
    """Raise if a method can't change a model, before any method has run.

    Args:
        model: Folder or Hub id of the model.
        methods: Names in `METHODS`.

    Raises:
        TypeError: If a method changes the layers of CLIP, and the model is another one.
        ValueError: If a method ends in a projection, and the model has none.
    """
    checked = CLIP_METHODS.keys() & set(methods)
    if not checked:
        return
    base = load_any(model)
    for method in sorted(checked):
        CLIP_METHODS[method](base, method)


def run_method(setup: ComparisonSetup, name: str, seed: int, method: str = "train", **settings: Any) -> MethodResult:
    """Run one method of a recipe with one seed.

    Args:
        setup: The model and data to start from.
        name: Name of the method in the recipe.
        seed: Seed of everything that the method draws at random.
        method: One of `METHODS`.
        **settings: Arguments of the method.

    Returns:
        The model that the method makes.
    """
    return METHODS[method](setup, name, seed, **settings)
