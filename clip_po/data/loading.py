"""Labelled images from wherever they lie: the Hub, a folder of images, Parquet files, `save_to_disk`."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """One split of an image-classification data set.

    Args:
        name: Id on the Hub; or a folder: one written by `save_to_disk`, one of Parquet files (`train-*.parquet`),
            or one of images (`train/<class>/*.jpg`).
        split: Name of the split; from the Hub, Parquet or images also a slice of it such as "train[:1000]". A single
            data set written by `save_to_disk` is the split "train".
        config: Name of the configuration, for data sets that have several.

    Raises:
        ValueError: There is no such data set or split; the message says what there is.
    """
    saved = _saved(name)
    if saved is not None:
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        if split not in splits:
            raise ValueError(
                f"{name!r} has no split {split!r}; it has {list(splits)}, and no slices. Give one of them by "
                "--dataset_train_split or --dataset_test_split."
            )
        return splits[split]
    try:
        return load_dataset(name, config, split=split)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"The split {split!r} of the data set {name!r} can't be loaded ({error}). Give a Hub id, or a folder "
            "written by save_to_disk, one of Parquet files (train-*.parquet) or one of images "
            "(train/<class>/*.jpg), and its split by --dataset_train_split or --dataset_test_split."
        ) from error


def _saved(name: str) -> Dataset | DatasetDict | None:
    folder = Path(name)
    if not any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        return None
    return load_from_disk(name)
