from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pytest
from samples import SCENE_CLASSES as CLASSES
from samples import make_scenes
from scenes import make_model, make_processor
from transformers import CLIPModel, CLIPProcessor

from clip_po.data.attacks.attack import TypographicAttack


@pytest.fixture(scope="session")
def processor() -> CLIPProcessor:
    return make_processor()


@pytest.fixture
def model() -> CLIPModel:
    return make_model()


@pytest.fixture(scope="session")
def other_model() -> CLIPModel:
    return make_model(seed=1)


@pytest.fixture(scope="session")
def dataset() -> datasets.Dataset:
    return make_scenes()


@pytest.fixture(scope="session")
def attack() -> TypographicAttack:
    return TypographicAttack(words=[*CLASSES, "tree"], size=(0.3, 0.4), min_side=32)


@pytest.fixture(scope="session")
def answers_of() -> Callable:
    """Answers made by hand, of models whose three answers per image are given."""
    from clip_po.evaluation.robustness import VARIANTS, Answers

    def make(
        label: Sequence[int],
        word: Sequence[int],
        cluster: Sequence[int] | None = None,
        **models: Sequence[Sequence[int]],
    ) -> Answers:
        return Answers(
            class_names=CLASSES,
            label=np.array(label),
            word=np.array(word),
            written=np.array([CLASSES[number] if number >= 0 else "tree" for number in word]),
            cluster=np.arange(len(label)) if cluster is None else np.array(cluster),
            predicted={name: dict(zip(VARIANTS, map(np.array, said), strict=True)) for name, said in models.items()},
        )

    return make
