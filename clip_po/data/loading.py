"""Load labelled images from the Hub, a folder of images, Parquet files, or a `save_to_disk` folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from clip_po.data.path_safety import check_links, check_resolved


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """Load one split of an image-classification dataset.

    Args:
        name: Id on the Hub, or a folder: written by `save_to_disk`, of Parquet files (`train-*.parquet`), or of images
            (`train/<class>/*.jpg`).
        split: Name of the split. From the Hub, Parquet files or images also a slice such as "train[:1000]". A single
            dataset written by `save_to_disk` is the split "train".
        config: Name of the configuration, for datasets that have several.

    Returns:
        The split.

    Raises:
        ValueError: If there is no such dataset or split, if the dataset would have to run a program, or if it names or
            links to a file outside its folder.
    """
    folders = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    if Path(name).is_dir():
        check_links(name)
        folders = [datasets.config.HF_DATASETS_CACHE, name]
    saved = _saved(name)
    if saved is not None:
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        if split not in splits:
            raise ValueError(
                f"{name!r} has no split {split!r}; it has {list(splits)}, and no slices. Choose one of them with "
                "--dataset_train_split or --dataset_test_split."
            )
        dataset = splits[split]
        check_resolved([file["filename"] for file in dataset.cache_files], folders, f"The dataset {name!r}")
    else:
        dataset = _loaded(name, split, config)
    check_resolved(_image_paths(dataset), folders, f"The dataset {name!r}")
    return dataset


def _saved(name: str) -> Dataset | DatasetDict | None:
    folder = Path(name)
    if not any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        return None
    return load_from_disk(name)


def _loaded(name: str, split: str, config: str | None) -> Dataset:
    if Path(name).is_dir():  # its README may name any file
        with _explained(name, split):
            files = load_dataset_builder(name, config).config.data_files or {}
        check_resolved([file for listed in files.values() for file in listed], [name], f"The dataset {name!r}")
    with _explained(name, split):
        return load_dataset(name, config, split=split)


@contextlib.contextmanager
def _explained(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError, DatasetGenerationError) as error:
        raise ValueError(
            f"The split {split!r} of the dataset {name!r} can't be loaded ({error.__cause__ or error}). Give a Hub "
            "id, or a folder written by save_to_disk, of Parquet files (train-*.parquet) or of images "
            "(train/<class>/*.jpg), and its split with --dataset_train_split or --dataset_test_split."
        ) from error


def _image_paths(dataset: Dataset) -> Iterator[str]:
    """Yield the paths stored in image columns instead of image bytes."""
    for column, feature in dataset.features.items():
        if not isinstance(feature, Image):
            continue
        for chunk in dataset.data.column(column).chunks:
            paths, images = (pc.struct_field(chunk, part) for part in ("path", "bytes"))
            yield from paths.filter(pc.and_(images.is_null(), paths.is_valid())).to_pylist()
