"""Labelled images from wherever they lie: the Hub, a folder of images, Parquet files, `save_to_disk`."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, get_dataset_split_names, load_dataset, load_from_disk


def split_names(name: str, config: str | None = None) -> list[str]:
    """The splits of a data set.

    Args:
        name: As for `load_split`.
        config: As for `load_split`.
    """
    saved = _saved(name)
    if saved is None:
        return list(get_dataset_split_names(name, config))
    return list(saved) if isinstance(saved, DatasetDict) else ["train"]


def load_split(name: str, split: str, config: str | None = None) -> Dataset:
    """One split of an image-classification data set.

    Args:
        name: Id on the Hub; or a folder: one written by `save_to_disk`, one of Parquet files (`train-*.parquet`),
            or one of images (`train/<class>/*.jpg`).
        split: Name of the split, or a slice of it such as "train[:1000]".
        config: Name of the configuration, for data sets that have several.

    Raises:
        ValueError: There is no such data set or split; the message says what there is.
    """
    saved = _saved(name)
    if isinstance(saved, Dataset):
        return saved
    if saved is not None:
        if split not in saved:
            raise ValueError(f"{name!r} has no split {split!r}; it has {list(saved)}.")
        return saved[split]
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
