"""Folders of images: which files belong to a split, and which folder names are the classes.

`datasets` looks for the names of splits anywhere in a path, so a class called "train" or a file called "test 1.png"
moves images into another split. Here, a split is a folder directly in the dataset folder, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of folders and files for each split, as `datasets` has them."""

_CANONICAL = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}


def split_name(name: str) -> str | None:
    """Return the split that a folder or file name stands for, such as "validation" for "val".

    Args:
        name: The whole name of a folder, or one word of the name of a file.

    Returns:
        A key of `SPLIT_NAMES`, or None if it is the name of no split.
    """
    return _CANONICAL.get(name.lower())


def find_images(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted by path. Hidden files and folders are left out.

    Args:
        folder: The folder.

    Returns:
        Files with an extension that Pillow can open.
    """
    return sorted(map(Path, _images(folder)))


def has_images(folder: Path) -> bool:
    """Return whether a folder or one of its subfolders holds an image. The search ends with the first one.

    Args:
        folder: The folder.

    Returns:
        Whether `find_images` would find any.
    """
    return any(_images(folder))


def _images(folder: Path) -> Iterator[str]:
    suffixes = {suffix for suffix, kind in Pillow.registered_extensions().items() if kind in Pillow.OPEN}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name):
                yield os.path.join(parent, name)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not part of the data.

    Args:
        name: Its name without the folders above it.

    Returns:
        True for names such as ".DS_Store" and "__MACOSX".
    """
    return name.startswith((".", "__"))


def find_split(folder: Path, split: str) -> Path:
    """Return the folder with the images of a split.

    Args:
        folder: The dataset folder.
        split: Name of the split. A folder of that name is taken as it is; otherwise the one with another name of the
            same split, such as "val" for "validation". A folder without any split folder is the split "train".

    Returns:
        A folder directly in `folder`, or `folder` itself.

    Raises:
        ValueError: If there is no such split, or it is not clear what is a split and what is a class.
    """
    folders = [path for path in _folders(folder) if has_images(path)]
    splits = [path for path in folders if split_name(path.name) is not None]
    others = [path.name for path in folders if path not in splits and path.name != split]
    exact = [path for path in folders if path.name == split]
    found = exact or [path for path in splits if split_name(path.name) == split_name(split)]
    listed = ", ".join(repr(path.name) for path in folders)
    if splits and others and (not found or not any(_folders(path) for path in splits)):
        raise ValueError(
            f"The folder {str(folder)!r} holds {listed}: it is not clear whether {splits[0].name!r} is a split or a "
            f"class. If it is a class, move all classes into {str(folder / 'train')!r}. If it is a split, move the "
            "other folders away or into it."
        )
    if not found and not splits and split_name(split) == "train":
        nested = [path for path in folders if len(folders) == 1 and any(map(split_name, _names(_folders(path))))]
        if nested:
            raise ValueError(
                f"The splits of {str(folder)!r} are in its folder {nested[0].name!r}. Give {str(nested[0])!r} instead."
            )
        return folder
    if len(found) != 1:
        problem = f"has several folders for the split {split!r}" if found else f"has no split {split!r}"
        has = (
            f"Its folders are {listed}" if splits else "Without split folders, all of its images are the split 'train'"
        )
        raise ValueError(
            f"The folder {str(folder)!r} {problem}. {has}. Name one with --dataset_train_split, "
            "--dataset_validation_split or --dataset_test_split."
        )
    return found[0]


def load_image_folder(folder: Path, split: str) -> Dataset:
    """Load the images of a split, with their folders as classes.

    Args:
        folder: The dataset folder: `<split>/<class>/*.jpg`, `<class>/*.jpg` for a single split, or images alone.
        split: Name of the split, as for `find_split`.

    Returns:
        Columns `image` and, if the images are in folders of classes, `label` (ClassLabel, sorted names). All splits in
        the folder share their classes.

    Raises:
        ValueError: As for `find_split`, or if it is not clear which folders are the classes.
    """
    chosen = find_split(folder, split)
    images = find_images(chosen)
    labels = _classes(chosen, images)
    if labels is None:
        return Dataset.from_dict({"image": list(map(str, images))}, features=Features({"image": Image()}))
    names = set(labels)
    if chosen != folder:
        names |= set(_classes_beside(folder, chosen))
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(names))})
    number = {name: index for index, name in enumerate(sorted(names))}
    columns = {"image": list(map(str, images)), "label": [number[name] for name in labels]}
    return Dataset.from_dict(columns, features=features)


def _classes(folder: Path, images: Sequence[Path]) -> list[str] | None:
    """Return the class of each image: the one level of folders whose names vary. None if the images are in none."""
    parts = [image.relative_to(folder).parts[:-1] for image in images]
    depths = {len(part) for part in parts}
    varying = [level for level, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1]
    if len(depths) == 1 and not varying:
        return None
    if len(depths) > 1 or len(varying) > 1:
        examples = " and ".join(str(image.relative_to(folder)) for image in _examples(images, depths, varying))
        raise ValueError(
            f"It is not clear which folders in {str(folder)!r} are the classes: {examples}. Put the images of a class "
            "into one folder, <class>/*.jpg, or list images and labels in a metadata.csv with the columns file_name "
            "and label."
        )
    return [part[varying[0]] for part in parts]


def _examples(images: Sequence[Path], depths: Iterable[int], varying: Sequence[int]) -> Iterator[Path]:
    """Yield two images that show why the classes are not clear."""
    yield images[0]
    first = images[0].parts
    for image in images:
        if len(image.parts) != len(first) if len(set(depths)) > 1 else image.parts[:-1] != first[:-1]:
            yield image
            return


def _classes_beside(folder: Path, chosen: Path) -> Iterator[str]:
    """Yield the classes of the other splits: a split may lack some, and its labels count the same ones."""
    for path in _folders(folder):
        if path != chosen and split_name(path.name) is not None:
            try:
                yield from _classes(path, find_images(path)) or ()
            except ValueError:  # of another layout; its own loading says so
                continue


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _names(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths]
