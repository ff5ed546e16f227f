"""A tiny CLIP on disk and small data sets of real files, for every test."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import samples
import torch
from samples import make_labelled, make_preferences, tiny_config, tiny_processor
from transformers import CLIPModel, CLIPProcessor
from transformers.utils import logging
from two_processes import TwoProcesses

# Tiny matrices are faster on one thread. Other numbers of threads sum in another order: make test-numeric tries them.
THREADS = [int(number) for number in os.environ.get("CLIP_PO_TEST_THREADS", "1").split()]
torch.set_num_threads(THREADS[0])


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(getattr(request, "param", THREADS[0]))


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """A trainer with a `log_level` sets it for the process, and later tests would read other logs."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def pytest_generate_tests(metafunc):
    if len(THREADS) > 1 and metafunc.definition.get_closest_marker("numeric"):
        metafunc.parametrize("threads", THREADS, indirect=True)


def pytest_collection_finish():
    """Leave what was imported out of the garbage that accelerate collects before each training: that takes longer."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Start the long tests first, so that none of them runs alone in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A folder with a tiny CLIPModel and its processor."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    CLIPModel(tiny_config()).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def make_trainer(request, clip_folder, tmp_path):
    """Make a trainer of the tiny CLIP. A module's `RUN` holds the arguments that all its runs share."""
    shared = getattr(request.module, "RUN", {})

    def make(train_dataset=None, model=clip_folder, folder="run", **arguments):
        given = {} if train_dataset is None else {"train_dataset": train_dataset}
        return samples.make_trainer(model, tmp_path / folder, **{**shared, **given, **arguments})

    return make


@pytest.fixture
def model(clip_folder) -> CLIPModel:
    return CLIPModel.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def processor(clip_folder) -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> Iterator[TwoProcesses]:
    processes = TwoProcesses(tmp_path_factory.mktemp("two-processes"))
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def labelled() -> datasets.Dataset:
    """16 pictures of four classes."""
    return make_labelled(16)


@pytest.fixture(scope="session")
def preferences() -> datasets.Dataset:
    """13 image-preferences: a number that no batch size divides."""
    return make_preferences(13)
