"""Preferences that reverse, keep or neutralize a concept, from labelled images or from pairs of texts.

==========================  ===========================================  =======================================
preferred                   function                                     settings of the trainer
==========================  ===========================================  =======================================
the other attribute's text  `reverse_attribute`                          any loss
neither text                `neutralize_attribute`, `neutralize_texts`   see below
the attribute's own text    `keep_attribute`                             any loss
everything else unchanged   `reg_dataset`, and `other_texts` here        reg_weight > 0
==========================  ===========================================  =======================================

If each text is preferred equally often, a loss that compares with the reference asks for no change: the log-ratios
are already balanced where the policy equals the reference. To make both texts equally probable, use
`reference_free=True` with "sigmoid" or "ipo", the loss "sft", or "kto_pair" with `undesirable_weight=0`, which treats
both texts as desirable and goes only part of the way. The gradient of such rows is weak. It is easier to reach neutral
by reversing, and then choosing a scale t between the original and the reversed model (`clip_po.concept.transform`).

The KL on ordinary images runs over the candidate texts of the same row. The two texts of a concept alone would
preserve nothing else, so `other_texts`, texts without the attribute, join the candidates of every row.

Afzali et al. reverse and neutralize gender on images of men and women. `neutralize_texts` is specific to this package.
Its images need no label and need not show the attribute: they prefer neither text, which draws the two texts together
for any image. Margins shrink, though their sign may remain. It is still a preference between texts given an image.

Source: Afzali et al. 2025, arXiv 2411.08923.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets

from clip_po.data.class_labels import column_texts, read_labels
from clip_po.data.class_positions import check_different_names
from clip_po.data.images import read_images
from clip_po.validation import check_candidates, check_text

ATTRIBUTE = "attribute"
"""The field of a template that is filled with the name of the attribute. Other fields are columns."""


def reverse_attribute(
    dataset: Dataset,
    template: str,
    attribute_column: str,
    attribute_names: Sequence[str] | None = None,
    image_column: str = "image",
    other_texts: Sequence[str] = (),
) -> Dataset:
    """Make preferences for the text of another attribute; the text of the image's own attribute is rejected.

    With more than two attributes, the others take turns among the images of each one.

    Args:
        dataset: N images with an attribute column, such as `gender`.
        template: Text with a field `{attribute}` for the attribute's name, and fields for other columns by their
            names: "a photo of a {attribute} who is a {occupation}".
        attribute_column: Column of ClassLabel or integers. `dataset.class_encode_column` converts strings.
        attribute_names: Names of the attributes in texts, in the order of the labels ("man", "woman"); by default the
            names of the ClassLabel.
        image_column: Column of images.
        other_texts: Texts without the attribute that join the candidates of every row.

    Returns:
        N image-preferences in the order of the dataset: image, chosen, rejected, candidates.

    Raises:
        ValueError: If a column is missing, a label is out of range, there are fewer than two attributes, the template
            has no `{attribute}` or a field that is not a column, or two texts are the same.
        TypeError: If `dataset` is not a single split.
    """
    images = _images(dataset, image_column)
    texts, labels = _texts(dataset, template, attribute_column, attribute_names)
    turns = [0] * len(texts[0])
    chosen = []
    for own, label in zip(texts, labels, strict=True):
        others = [text for number, text in enumerate(own) if number != label]
        chosen.append(others[turns[label] % len(others)])
        turns[label] += 1
    rejected = [own[label] for own, label in zip(texts, labels, strict=True)]
    return _preferences(images, chosen, rejected, texts, other_texts)


def keep_attribute(
    dataset: Dataset,
    template: str,
    attribute_column: str,
    attribute_names: Sequence[str] | None = None,
    image_column: str = "image",
    other_texts: Sequence[str] = (),
) -> Dataset:
    """Make preferences for the text of the image's own attribute, for images on which it must not change.

    The rows are those of `reverse_attribute` with chosen and rejected texts exchanged. Join both kinds with
    `datasets.concatenate_datasets`. For images without the attribute, use `reg_dataset` instead.

    Args:
        dataset: As for `reverse_attribute`.
        template: As for `reverse_attribute`.
        attribute_column: As for `reverse_attribute`.
        attribute_names: As for `reverse_attribute`.
        image_column: As for `reverse_attribute`.
        other_texts: As for `reverse_attribute`.

    Returns:
        N image-preferences in the order of the dataset: image, chosen, rejected, candidates. With more than two
        attributes, the others take turns as the rejected one.

    Raises:
        ValueError, TypeError: As for `reverse_attribute`.
    """
    rows = reverse_attribute(dataset, template, attribute_column, attribute_names, image_column, other_texts)
    return rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})


def neutralize_attribute(
    dataset: Dataset,
    template: str,
    attribute_column: str,
    attribute_names: Sequence[str] | None = None,
    image_column: str = "image",
    other_texts: Sequence[str] = (),
) -> Dataset:
    """Make preferences for neither text: each image prefers each attribute's text once and rejects each once.

    The module docstring lists the losses and settings for which this has an effect.

    Args:
        dataset: N images. Only the names of the attribute are used.
        template: As for `reverse_attribute`.
        attribute_column: As for `reverse_attribute`.
        attribute_names: As for `reverse_attribute`, C names.
        image_column: As for `reverse_attribute`.
        other_texts: As for `reverse_attribute`.

    Returns:
        C * N image-preferences: all images with the first attribute's text chosen and the second's rejected, then
        all with the second's and the third's, and so on; the last rejects the first's.

    Raises:
        ValueError: As for `reverse_attribute`.
    """
    images = _images(dataset, image_column)
    texts, _ = _texts(dataset, template, attribute_column, attribute_names)
    return _each_chosen_once(images, texts, other_texts)


def neutralize_texts(
    dataset: Dataset,
    text_pairs: Sequence[tuple[str, str]],
    image_column: str = "image",
    rounds: int = 1,
    other_texts: Sequence[str] = (),
) -> Dataset:
    """Make preferences for neither text of a pair, on images without a label of the attribute.

    The pairs take turns among the images: image i gets pair (i + r * N) modulo P in round r. Each image prefers each
    text of its pair once. To reverse a concept without labels, label the images with the model itself
    (`clip_po.pseudo_labels`) and use `reverse_attribute`.

    Args:
        dataset: N images.
        text_pairs: P pairs of texts that differ only in the attribute: ("a photo of a man who is a doctor", "a photo
            of a woman who is a doctor").
        image_column: Column of images.
        rounds: Number of times each image is used, each time with another pair if there are more pairs than images.
        other_texts: As for `reverse_attribute`.

    Returns:
        2 * N * rounds image-preferences: all with the first text chosen, then all with the second.

    Raises:
        ValueError: If there are no pairs, an entry is not a pair of two different texts, `rounds` < 1 or too small to
            use every pair, or a column is missing.
    """
    if not text_pairs:
        raise ValueError("text_pairs is empty; give at least one pair of texts that differ in the attribute.")
    for number, pair in enumerate(text_pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"text_pairs[{number}] must be a pair of texts, got {pair!r}.")
        check_candidates(list(pair), f"text_pairs[{number}]")
    images = _images(dataset, image_column)
    if rounds < 1 or rounds * len(images) < len(text_pairs):
        raise ValueError(
            f"rounds={rounds} uses each of the {len(images)} images {rounds} times, too few for {len(text_pairs)} "
            f"text_pairs. Set rounds to at least {-(-len(text_pairs) // len(images))}."
        )
    repeated = concatenate_datasets([images] * rounds)
    texts = [list(text_pairs[number % len(text_pairs)]) for number in range(len(repeated))]
    return _each_chosen_once(repeated, texts, other_texts)


def _texts(
    dataset: Dataset, template: str, attribute_column: str, attribute_names: Sequence[str] | None
) -> tuple[list[list[str]], list[int]]:
    """Return for each row the texts of all attributes, and its label."""
    names, labels = read_labels(dataset, attribute_column, attribute_names)
    check_different_names(names)
    if len(names) < 2:
        raise ValueError(f"Column {attribute_column!r} has only {names}; a preference needs two attributes or more.")
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"template is not a text with fields in braces ({error}): {template!r}.") from error
    if ATTRIBUTE not in fields:
        raise ValueError(
            f"template must contain '{{{ATTRIBUTE}}}' where the name of the attribute goes, got {template!r}."
        )
    columns = {field: _words(dataset, field, template) for field in fields if field != ATTRIBUTE}
    rows = [{column: words[row] for column, words in columns.items()} for row in range(len(dataset))]
    return [[template.format(**{ATTRIBUTE: name}, **row) for name in names] for row in rows], labels.tolist()


def _words(dataset: Dataset, column: str, template: str) -> list[str]:
    if column not in dataset.column_names:
        raise ValueError(
            f"template {template!r} has a field {column!r}, but the columns are {dataset.column_names}. Each "
            f"field except {ATTRIBUTE!r} is filled from the column of its name."
        )
    is_class = isinstance(dataset.features[column], ClassLabel)
    words = column_texts(dataset, column) if is_class else list(dataset.with_format(None)[column])
    for row, word in enumerate(words):
        check_text(word, f"Row {row}: column {column!r}", "Fill it in or drop the row.")
    return words


def _images(dataset: Dataset, image_column: str) -> Dataset:
    """Return the images alone, in a column `image`."""
    images = read_images(dataset, image_column)
    if len(images) == 0:
        raise ValueError("The dataset is empty; give it at least one image.")
    return images.rename_columns({image_column: "image"} if image_column != "image" else {}).cast_column(
        "image", Image()
    )


def _each_chosen_once(images: Dataset, texts: Sequence[Sequence[str]], other_texts: Sequence[str]) -> Dataset:
    """Use each image once per text, with that text chosen and the next one rejected."""
    count = len(texts[0])
    parts = [
        _preferences(
            images,
            [own[number] for own in texts],
            [own[(number + 1) % count] for own in texts],
            texts,
            other_texts,
        )
        for number in range(count)
    ]
    # Concatenated: selecting rows twice would copy the bytes of every image.
    return concatenate_datasets(parts)


def _preferences(
    images: Dataset,
    chosen: Sequence[str],
    rejected: Sequence[str],
    texts: Sequence[Sequence[str]],
    other_texts: Sequence[str],
) -> Dataset:
    candidates = [[*own, *other_texts] for own in texts]
    for row, own in enumerate(candidates):
        check_candidates(own, f"Row {row}: the texts of its attributes and other_texts")
    features: Mapping[str, Any] = {
        "chosen": Value("string"),
        "rejected": Value("string"),
        "candidates": List(Value("string")),
    }
    columns = {"chosen": list(chosen), "rejected": list(rejected), "candidates": candidates}
    return concatenate_datasets([images, Dataset.from_dict(columns, features=Features(features))], axis=1)
