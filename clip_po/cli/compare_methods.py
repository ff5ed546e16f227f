"""The methods that clip-po compare knows: each makes of the same model and data a model that answers differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from clip_po.baselines.defense_prefix import learn_prefix, prefix_class_embeddings
from clip_po.baselines.head_ablation import ablate_reading_heads
from clip_po.baselines.text_removal import TextRemoval, processor_without_text
from clip_po.cli import train
from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.typographic import TypographicPreferences
from clip_po.evaluation.interpolation import ALPHAS, choose_alpha, interpolate, sweep_interpolation
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.models import load_any


@dataclass(frozen=True)
class Contestant:
    """A model as it is to be judged.

    Attributes:
        model: The model.
        processor: What it sees images by.
        class_embeds: Tensor[C, D], what stands for the classes; None for those of the prompt template.
        details: What was chosen or learnt on the way, for the report.
    """

    model: CLIPModel | PeftModel
    processor: CLIPProcessor
    class_embeds: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What all methods start from.

    Attributes:
        model: Folder or Hub id of the model.
        processor: Its processor.
        train: Labelled images to learn from.
        validation: Labelled images to choose on.
        class_names: The classes by label.
        template: Prompt of a class, with one `{}`.
        image_column: Column of images.
        label_column: Column of classes.
        attack: Makes the attack of training for a seed.
        training: Flags of `clip-po train` that all trained methods share: data, columns and schedule.
        folder: Where each method has a folder with one for each seed.
        batch_size: Images a forward where nothing is trained.
    """

    model: str
    processor: CLIPProcessor
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

    def base(self) -> CLIPModel | PeftModel:
        """The model before anything is done to it."""
        return load_any(self.model)

    def checkpoint(self, method: str, seed: int) -> Path:
        """Where a trained method's checkpoint lies."""
        return self.folder / method / f"seed-{seed}" / "checkpoint"

    def validation_images(self, seed: int) -> RobustnessImages:
        """The validation images with attacks of training, drawn anew for the seed."""
        return RobustnessImages(
            self.validation,
            self.attack(seed + 1),
            self.processor,
            self.class_names,
            image_column=self.image_column,
            label_column=self.label_column,
            keep_bytes=2**30,
        )


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of a command line; None is left out."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(json.dumps(v) if isinstance(v, (bool, dict)) else str(v) for v in values)]
    return words


def trained(contest: Contest, name: str, seed: int, **settings: Any) -> Contestant:
    """`clip-po train` with the settings."""
    folder = str(contest.checkpoint(name, seed))
    given = {**contest.training, **settings, "seed": seed, "output_dir": folder}
    trainer, task = train.align(*train.parse(flags(given)))
    train.save(trainer, task)
    return Contestant(trainer.model, contest.processor, details={"learning_rate": trainer.args.learning_rate})


def interpolated(contest: Contest, name: str, seed: int, of: str, max_clean_cost: float = 0.5) -> Contestant:
    """PAINT and WiSE-FT: between the base and the weights of another method, chosen on validation images.

    Source: Ilharco et al. 2022, arXiv 2208.05592; Wortsman et al. 2022, arXiv 2109.01903.
    """
    base, aligned = contest.base(), load_any(str(contest.checkpoint(of, seed)))
    images = contest.validation_images(seed)
    points = sweep_interpolation(
        base, aligned, images, [contest.template], ALPHAS, batch_size=contest.batch_size, disable_tqdm=True
    )
    choice = choose_alpha(points, max_clean_cost)
    model = interpolate(base, aligned, choice.point.alpha)
    return Contestant(model, contest.processor, details={"alpha": choice.point.alpha, "choice": choice.describe()})


def ablated(contest: Contest, name: str, seed: int, **settings: Any) -> Contestant:
    """Dyslexify: attention heads that read are silenced, as many as serve on validation images."""
    found = ablate_reading_heads(
        contest.base(),
        contest.validation_images(seed),
        [contest.template],
        batch_size=contest.batch_size,
        **settings,
    )
    return Contestant(found.model, contest.processor, details={"heads": found.heads})


def text_removed(contest: Contest, name: str, seed: int, **settings: Any) -> Contestant:
    """Text is found and filled in before the model sees the image."""
    return Contestant(contest.base(), processor_without_text(contest.processor, TextRemoval(**settings)))


def prefixed(contest: Contest, name: str, seed: int, **settings: Any) -> Contestant:
    """Defense-Prefix: a learned token before the class name."""
    model = contest.base()
    preferences = TypographicPreferences(
        contest.train,
        contest.attack(seed),
        contest.class_names,
        contest.template,
        contest.image_column,
        contest.label_column,
    )
    prefix = learn_prefix(model, contest.processor, preferences, seed=seed, disable_tqdm=True, **settings)
    embeds = prefix_class_embeddings(model, contest.processor, prefix, contest.class_names, [contest.template])
    return Contestant(model, contest.processor, embeds)


METHODS: Mapping[str, Callable[..., Contestant]] = {
    "train": trained,
    "interpolation": interpolated,
    "head_ablation": ablated,
    "text_removal": text_removed,
    "defense_prefix": prefixed,
}
"""What `method:` names in a recipe; `train` where nothing is named."""

WITHOUT_SEED = frozenset({"text_removal"})
"""Methods without any draw, which give the same for every seed."""


def make(contest: Contest, name: str, seed: int, method: str = "train", **settings: Any) -> Contestant:
    """The contestant that a recipe's settings describe.

    Args:
        contest: Model and data.
        name: The recipe's name for it.
        seed: Of whatever is drawn.
        method: One of `METHODS`.
        **settings: What the method takes.
    """
    return METHODS[method](contest, name, seed, **settings)
