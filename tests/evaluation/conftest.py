from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pytest
import torch
from samples import SCENE_CLASSES as CLASSES
from samples import make_scenes
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_po.data.attacks.typographic import TypographicAttack

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_processor() -> CLIPProcessor:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]),
    )


def make_model(seed: int = 0) -> CLIPModel:
    tokenizer = make_processor().tokenizer
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_factor": 5.0,
    }
    torch.manual_seed(seed)
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 24,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
            initializer_factor=5.0,
        )
    ).eval()


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
