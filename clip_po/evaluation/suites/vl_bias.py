"""VL-Bias: photographs of people in 52 activities and 13 occupations, the gender data of the paper.

This loader was written without access to the archive. The words, the folders `verb` and `occu`, and the index files
that list images by word are documented in the README and scripts of its authors. Two things are assumptions: that the
folders contain one folder per word or files named after the word, and that a path tells who is shown. The authors'
scripts do not read gender labels; they use the gender predicted by the model under test. If the paths do not tell the
gender, pass `genders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value

from clip_po.bounded_text import parse_json
from clip_po.data.image_folder import find_images
from clip_po.data.path_safety import check_inside, check_links

_ACTIVITIES = """
baking begging biking calling cleaning climbing cooking coughing crying drinking driving eating exercising falling
fishing hitting hugging jogging jumping kicking kneeling laughing lifting painting picking pitching praying reading
riding rowing running serving sewing shopping shouting sitting skating sleeping smiling speaking spying standing
staring stretching studying sweeping talking throwing walking washing waving working
"""
_OCCUPATIONS = "athlete chef doctor engineer farmer footballer judge mechanic nurse pilot police runner soldier"
ACTIVITIES, OCCUPATIONS = tuple(_ACTIVITIES.split()), tuple(_OCCUPATIONS.split())
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "activities": ("verb", ACTIVITIES),
    "occupations": ("occu", OCCUPATIONS),
}
"""Folder and words by part. The name of the index file begins with that of the folder."""

GENDERS = {"man": "man", "men": "man", "male": "man", "woman": "woman", "women": "woman", "female": "woman"}
"""Words in a path that tell who is shown."""


def load_vl_bias(folder: str | Path, part: str, genders: Mapping[str, str] | None = None) -> Dataset:
    """Load the images of one part of VL-Bias.

    The images are read from the index `verb*.json` or `occu*.json` if there is one: {"data": {word: [{"original":
    path}, ...]}}, with paths relative to the folder. Otherwise they are read from the folder `verb` or `occu`, where
    the word is the nearest folder above an image, or the file name before a number (`baking_12.jpg`).

    Args:
        folder: The unpacked archive of the authors.
        part: "activities" or "occupations".
        genders: "man" or "woman" by path relative to `folder`, with "/"; for images whose path does not tell the
            gender in the name of a folder or of the file (`nurse/women/3.jpg`, `nurse_male_3.jpg`).

    Returns:
        Columns `image`, `label` (ClassLabel of the part's words), `gender` ("man", "woman", or None if unknown) and
        `path`, sorted by path.

    Raises:
        ValueError: If the part or a gender is unknown, there are no images, an image has an unknown word, the index is
            not readable, leaves the folder or names a missing image, or a link leads out of the folder. The message
            names the file.

    Source: Zhang, Wang and Sang 2022, arXiv 2207.01056, Sec. 4 (the dataset), and the scripts of its authors.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {list(PARTS)}, got {part!r}.")
    base = Path(folder)
    check_links(base)
    begins, words = PARTS[part]
    index = next(iter(sorted(base.glob(f"{begins}*.json"))), None)
    found = _indexed(base, index) if index is not None else _in_folders(base, begins, words)
    if not found:
        raise ValueError(
            f"{base} contains no images of {part}: no index {begins}*.json, and none in {base / begins}. Unpack the "
            "archive of the authors there."
        )
    given = genders or {}
    rows: dict[str, list[str | int | None]] = {"image": [], "label": [], "gender": [], "path": []}
    for path, word in sorted(found.items()):
        if word not in words:
            raise ValueError(
                f"{path} shows {word!r}, which is none of the {len(words)} {part} of VL-Bias. Remove the file, or fix "
                "the index."
            )
        gender = given.get(path, _gender(path))
        if gender not in ("man", "woman", None):
            raise ValueError(f'The gender of {path} must be "man" or "woman", got {gender!r}.')
        for column, value in zip(rows, (str(base / path), words.index(word), gender, path), strict=True):
            rows[column].append(value)
    features = {"image": Image(), "label": ClassLabel(names=list(words)), "gender": Value("string")}
    return Dataset.from_dict(rows, features=Features({**features, "path": Value("string")}))


def _indexed(base: Path, index: Path) -> dict[str, str]:
    """Return words by path, read from an index."""
    try:
        listed = parse_json(index.read_text(encoding="utf-8"))["data"]
        found = {str(image["original"]): str(word) for word, images in listed.items() for image in images}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{index} is not an index of VL-Bias ({type(error).__name__}: {error}), expected {{"data": {{word: '
            '[{"original": path}, ...]}}. Use the file of the authors.'
        ) from error
    for path in found:
        check_inside(path, str(index))
        if not (base / path).is_file():
            raise ValueError(
                f"{index} names {path!r}, but there is no such image in {base}. Unpack the archive again."
            )
    return found


def _in_folders(base: Path, begins: str, words: tuple[str, ...]) -> dict[str, str]:
    """Return words by path, from the names of folders and files."""
    found = {}
    for file in find_images(base / begins):
        path = file.relative_to(base)
        named = [part for part in reversed(path.parts[:-1]) if part in words]
        found[path.as_posix()] = named[0] if named else re.split(r"[_\-\d]", file.stem)[0]
    return found


def _gender(path: str) -> str | None:
    """Return the gender that a path tells; None if it tells none, or both."""
    said = {GENDERS[word] for word in re.split(r"[^a-z]+", path.lower()) if word in GENDERS}
    return said.pop() if len(said) == 1 else None
