"""Load labelled images from the Hub, a folder of images, table files, or a `save_to_disk` folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Image,
    List,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard, constants

from clip_po.bounded_text import parse_yaml
from clip_po.data.image_folder import has_images, load_image_folder
from clip_po.data.path_safety import check_links, check_resolved
from clip_po.data.row_kinds import PAIR_IMAGES
from clip_po.data.table_files import READERS, decode_images, find_tables, load_tables


def load_split(name: str, split: str, config: str | None = None, image_column: str = "image") -> Dataset:
    """Load one split of an image-classification dataset.

    Args:
        name: Id on the Hub; a CSV, TSV, JSON or Parquet file; or a folder: written by `save_to_disk`, of such files
            (`train-*.parquet`, `train.csv`, `train/metadata.csv`), or of images (`train/<class>/*.jpg`).
        split: Name of the split, also a slice such as "train[:1000]" except of what `save_to_disk` wrote. A file, a
            folder without splits, and a single dataset written by `save_to_disk` are the split "train".
        config: Name of the configuration, for datasets that have several.
        image_column: Column of a table that is read as images: paths relative to the file, or bytes. So are the
            columns of preferences between images.

    Returns:
        The split.

    Raises:
        ValueError: If there is no such dataset or split, if the dataset would have to run a program, or if it names or
            links to a file outside its folder.
    """
    folders = [datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    if Path(name).is_file():
        folders = [datasets.config.HF_DATASETS_CACHE, str(Path(name).parent)]
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
        dataset = _local(Path(name), split, config, image_column) or _loaded(name, split, config)
    check_resolved(_image_paths(dataset), folders, f"The dataset {name!r}")
    return dataset


def _saved(name: str) -> Dataset | DatasetDict | None:
    folder = Path(name)
    if not any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        return None
    return load_from_disk(name)


def _local(path: Path, split: str, config: str | None, image_column: str) -> Dataset | None:
    """Load a split from a file or folder. None for what `datasets` loads, such as a folder with a dataset card."""
    if config is not None or not path.exists() or _describes_itself(path):
        return None
    if path.is_file() and path.suffix.lower() not in READERS:
        return None

    def whole(split: str) -> Dataset | None:
        if path.is_file() and split != "train":
            raise ValueError(f"The file {str(path)!r} is the split 'train'; it has no split {split!r}.")
        files = [path] if path.is_file() else find_tables(path, split)
        if not files:
            return load_image_folder(path, split) if has_images(path) else None
        with loading_explained(str(path), split):
            rows = load_tables(files)
        parents = {file.parent for file in files}
        relative_to = parents.pop() if len(parents) == 1 else path
        for column in dict.fromkeys((image_column, *PAIR_IMAGES)):
            rows = decode_images(rows, column, relative_to)
        return rows

    names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[\]+]+)", split))
    found = {name: rows for name in names if (rows := whole(name)) is not None}
    if not found:
        return None
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in found.items()})
    sliced = [found[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return sliced[0] if len(sliced) == 1 else concatenate_datasets(sliced)


def _describes_itself(folder: Path) -> bool:
    """Return whether a folder says which files belong to its splits, or has a loading script, which is refused."""
    card = folder / "README.md"
    with loading_explained(str(folder), ""):
        if card.is_file() and (
            header := re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---", card.read_text("utf-8"), re.DOTALL)
        ):
            parse_yaml(header[1])  # DatasetCard and datasets read it without bounds
        configured = card.is_file() and DatasetCard.load(card).data.get("configs") is not None
    return configured or (folder / f"{folder.name}.py").is_file()


def _loaded(name: str, split: str, config: str | None) -> Dataset:
    if Path(name).is_dir():  # its README may name any file
        with loading_explained(name, split):
            files = load_dataset_builder(name, config).config.data_files or {}
        check_resolved([file for listed in files.values() for file in listed], [name], f"The dataset {name!r}")
    with loading_explained(name, split):
        return load_dataset(name, config, split=split)


@contextlib.contextmanager
def loading_explained(name: str, split: str) -> Iterator[None]:
    """Turn the errors of `datasets` into one that says what can be loaded.

    Args:
        name: The dataset.
        split: Name of the split.

    Yields:
        Nothing.

    Raises:
        ValueError: If the block can't load the split.
    """
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
        inner = feature.feature if isinstance(feature, List) else feature
        if not isinstance(inner, Image):
            continue
        for chunk in dataset.data.column(column).chunks:
            files = pc.list_flatten(chunk) if isinstance(feature, List) else chunk
            paths, images = (pc.struct_field(files, part) for part in ("path", "bytes"))
            yield from paths.filter(pc.and_(images.is_null(), paths.is_valid())).to_pylist()
