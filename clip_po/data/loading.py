"""Labelled images from wherever they lie: the Hub, a folder of images, Parquet files, `save_to_disk`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from clip_po.data.paths import check_links, check_resolved


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """One split of an image-classification data set.

    Args:
        name: Id on the Hub; or a folder: one written by `save_to_disk`, one of Parquet files (`train-*.parquet`),
            or one of images (`train/<class>/*.jpg`).
        split: Name of the split; from the Hub, Parquet or images also a slice of it such as "train[:1000]". A single
            data set written by `save_to_disk` is the split "train".
        config: Name of the configuration, for data sets that have several.

    Raises:
        ValueError: There is no such data set or split; the message says what there is. Or it holds a program that
            would have to run, or names or links to a file outside its folder.
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
                f"{name!r} has no split {split!r}; it has {list(splits)}, and no slices. Give one of them by "
                "--dataset_train_split or --dataset_test_split."
            )
        dataset = splits[split]
        check_resolved([file["filename"] for file in dataset.cache_files], folders, f"The data set {name!r}")
    else:
        dataset = _loaded(name, split, config)
    check_resolved(_image_paths(dataset), folders, f"The data set {name!r}")
    return dataset


def _saved(name: str) -> Dataset | DatasetDict | None:
    folder = Path(name)
    if not any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        return None
    return load_from_disk(name)


def _loaded(name: str, split: str, config: str | None) -> Dataset:
    if Path(name).is_dir():  # its README may name files from anywhere
        with _explained(name, split):
            files = load_dataset_builder(name, config).config.data_files or {}
        check_resolved([file for listed in files.values() for file in listed], [name], f"The data set {name!r}")
    with _explained(name, split):
        return load_dataset(name, config, split=split)


@contextlib.contextmanager
def _explained(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError, DatasetGenerationError) as error:
        raise ValueError(
            f"The split {split!r} of the data set {name!r} can't be loaded ({error.__cause__ or error}). Give a Hub "
            "id, or a folder written by save_to_disk, one of Parquet files (train-*.parquet) or one of images "
            "(train/<class>/*.jpg), and its split by --dataset_train_split or --dataset_test_split."
        ) from error


def _image_paths(dataset: Dataset) -> Iterator[str]:
    """Paths that stand in columns of images in the place of images."""
    for column, feature in dataset.features.items():
        if not isinstance(feature, Image):
            continue
        for chunk in dataset.data.column(column).chunks:
            paths, images = (pc.struct_field(chunk, part) for part in ("path", "bytes"))
            yield from paths.filter(pc.and_(images.is_null(), paths.is_valid())).to_pylist()
