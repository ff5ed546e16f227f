"""A tiny CLIP on disk and small data sets of real files, for every test."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from samples import make_labelled, make_preferences, tiny_config, tiny_processor
from transformers import CLIPModel, CLIPProcessor

# Tiny matrices are faster on one thread, and their sums come in one order.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A folder with a tiny CLIPModel and its processor."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    CLIPModel(tiny_config()).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def model(clip_folder) -> CLIPModel:
    return CLIPModel.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def processor(clip_folder) -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def labelled() -> datasets.Dataset:
    """16 pictures of four classes."""
    return make_labelled(16)


@pytest.fixture(scope="session")
def preferences() -> datasets.Dataset:
    """13 image-preferences: a number that no batch size divides."""
    return make_preferences(13)
