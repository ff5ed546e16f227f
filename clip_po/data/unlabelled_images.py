"""Load images of any kind without labels, such as the generic images that preserve what a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage

from clip_po.data.image_folder import find_images, find_split, has_images
from clip_po.data.loading import load_split, loading_explained
from clip_po.data.path_safety import check_links
from clip_po.data.table_files import find_tables

IMAGES = Features({"image": ImageFeature()})


def load_images(name: str, split: str, most: int, seed: int = 0, others: Sequence[str] = ()) -> Dataset:
    """Load images, with labels or without.

    Args:
        name: A Hub id, or a file or folder as for `load_split`. A folder of images may have folders of any kind in it.
        split: Name of the split.
        most: Number of images to keep at most, >= 1. Those of a local dataset are drawn at random. A dataset on the
            Hub is streamed, and its first images are kept, so that nothing else is downloaded.
        seed: Seed of the draw.
        others: Columns to keep beside the images where the dataset has them, such as `text`.

    Returns:
        The images in a column `image`, and the `others` that there are.

    Raises:
        ValueError: If there is no such dataset or split, there are no images in it, or it is not clear which of its
            columns has the images.
    """
    if not Path(name).exists():
        return _first_images(name, split, most, others)
    images = _local_images(Path(name), split, others)
    if len(images) == 0:
        raise ValueError(f"The split {split!r} of {name!r} is empty. Give one with images.")
    return images if len(images) <= most else images.shuffle(seed=seed).select(range(most))


def _local_images(path: Path, split: str, others: Sequence[str]) -> Dataset:
    if path.is_dir() and has_images(path) and not find_tables(path, split):
        check_links(path)
        return Dataset.from_dict({"image": list(map(str, find_images(find_split(path, split))))}, features=IMAGES)
    dataset = load_split(str(path), split)
    column = _image_column(dataset.features, str(path))
    images = dataset.select_columns([column, *(name for name in others if name in dataset.column_names)])
    return images if column == "image" else images.rename_column(column, "image")


def _first_images(name: str, split: str, most: int, others: Sequence[str]) -> Dataset:
    with loading_explained(name, split):
        stream = load_dataset(name, split=split, streaming=True)
        column = _image_column(stream.features or {}, name)
        kept = [name for name in others if name in (stream.features or {})]
        encoded = stream.select_columns([column, *kept]).cast_column(column, ImageFeature(decode=False))
        rows = [{"image": row[column], **{name: row[name] for name in kept}} for row in encoded.take(most)]
        features = Features({**IMAGES, **{name: (stream.features or {})[name] for name in kept}})
        images = Dataset.from_list(rows, features=features)
        # Of a folder of images on the Hub, a row is an address, which each read would download again.
        arrow = images.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100, desc="Images")
        return arrow.with_format(None)


def _image_column(features: Features | dict[str, object], name: str) -> str:
    columns = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise ValueError(
            f"{name!r} has {len(columns)} columns of images {columns}, of {list(features)}. Give a dataset with one, "
            "or with a column 'image'."
        )
    return columns[0]
