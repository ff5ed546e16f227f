"""Pictures of attacked images with the answers of a model before and after alignment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_po.data.attacks.drawing import Colour
from clip_po.data.attacks.fonts import Font, load_font, training_fonts
from clip_po.data.attacks.glyphs import missing_letters
from clip_po.data.attacks.words import spelling
from clip_po.evaluation.robustness import Answers
from clip_po.validation import COUNT, check_number

CHANGES = ("fixed", "still wrong", "newly broken")
"""Kinds of change between the answers before and after alignment."""

_PAGE, _CARD, _EDGE, _FRAME = (244, 245, 248), (255, 255, 255), (222, 225, 231), (236, 238, 242)
_INK, _QUIET = (24, 28, 36), (106, 113, 126)
_RIGHT, _WORD, _OTHER = (18, 128, 74), (200, 36, 46), (184, 104, 8)
_LEGEND = {"right": _RIGHT, "the written word": _WORD, "wrong otherwise": _OTHER}
_LEGEND_WITHOUT = {"right": _RIGHT, "wrong": _OTHER}
_BADGES = {"fixed": _RIGHT, "still wrong": _OTHER, "newly broken": _WORD}
_SIDE, _PAD, _GAP, _MARGIN, _LINE = 256, 16, 24, 48, 30
_CARD_WIDTH = _SIDE + 2 * _PAD
_CARD_HEIGHT = _SIDE + 2 * _PAD + 4 * _LINE + 4
_HEADER = 156


@dataclass(frozen=True)
class Example:
    """One attacked image with its answers.

    Attributes:
        index: Index of the item in the `RobustnessImages`.
        change: One of `CHANGES`.
        truth: Name of the true class.
        word: The word written on the image; "" for an image without one.
        before: Name of the predicted class before alignment.
        after: Name of the predicted class after alignment.
    """

    index: int
    change: str
    truth: str
    word: str
    before: str
    after: str


@dataclass(frozen=True)
class Gallery:
    """Examples to show together.

    Attributes:
        title: Heading.
        note: A line below it, such as `changes_line`.
        examples: The examples.
        picture: Function that returns the image of an example's index.
    """

    title: str
    note: str
    examples: Sequence[Example]
    picture: Callable[[int], Image.Image]


def changes(answers: Answers, before: str, after: str) -> dict[str, np.ndarray]:
    """Find the typographic images that the model answers wrongly before or after alignment.

    Args:
        answers: From `evaluate_robustness`.
        before: Name of the model before alignment.
        after: Name of the model after alignment.

    Returns:
        For each of `CHANGES`, array of item indices in ascending order.

    Raises:
        ValueError: If `answers` has no model of that name.
    """
    was = answers.predictions_of(before)["typographic"] == answers.label
    now = answers.predictions_of(after)["typographic"] == answers.label
    kinds = {"fixed": ~was & now, "still wrong": ~was & ~now, "newly broken": was & ~now}
    return {name: np.flatnonzero(chosen) for name, chosen in kinds.items()}


def changes_line(answers: Answers, before: str, after: str) -> str:
    """Return the number of images per kind of change, in one line.

    Show it above chosen examples, which are not representative of all images.

    Args:
        answers: As in `changes`.
        before: As in `changes`.
        after: As in `changes`.

    Returns:
        The line.

    Raises:
        ValueError: As in `changes`.
    """
    counts = {name: len(found) for name, found in changes(answers, before, after).items()}
    rest = len(answers.label) - sum(counts.values())
    listed = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"Of {len(answers.label):,} attacked images: {listed}, {rest:,} right before and after."


def choose_examples(answers: Answers, before: str, after: str, count: int = 12, seed: int = 0) -> list[Example]:
    """Choose changed images at random: mostly fixed ones, and a few that are still wrong or newly broken.

    About a sixth of `count` is reserved for images that are still wrong, and another sixth for newly broken ones.
    Places that one kind cannot fill go to the other kinds. The sample is not representative: show it below
    `changes_line`.

    Args:
        answers: As in `changes`.
        before: As in `changes`.
        after: As in `changes`.
        count: Largest number of examples, >= 1.
        seed: Seed of the choice.

    Returns:
        Up to `count` examples, fixed ones first. There are fewer if fewer images are answered wrongly.

    Raises:
        ValueError: If `count` < 1; also as in `changes`.
    """
    return draw_examples(answers, before, after, "typographic", changes(answers, before, after), count, seed)


def draw_examples(
    answers: Answers,
    before: str,
    after: str,
    variant: str,
    kinds: Mapping[str, np.ndarray],
    count: int,
    seed: int,
) -> list[Example]:
    """Draw examples at random: mostly of the first kind of change, and a few of the others.

    About a sixth of `count` is reserved for each of the other kinds. Places that one kind cannot fill go to the
    others.

    Args:
        answers: As in `changes`.
        before: As in `changes`.
        after: As in `changes`.
        variant: The images in the answers.
        kinds: Array of item indices for each kind of change.
        count: Largest number of examples, >= 1.
        seed: Seed of the draw.

    Returns:
        Up to `count` examples, one kind after the other.

    Raises:
        ValueError: If `count` < 1; also as in `changes`.
    """
    check_number("count", count, COUNT)
    rng = np.random.default_rng(seed)
    pools = {name: rng.permutation(found) for name, found in kinds.items()}
    few, (main, *others) = count // 6 or int(count > 2), pools
    taken = {name: min(few, len(pools[name])) for name in others}
    taken = {main: min(count - sum(taken.values()), len(pools[main])), **taken}
    for name in pools:
        taken[name] += min(count - sum(taken.values()), len(pools[name]) - taken[name])
    names = answers.class_names
    predicted = {model: answers.predictions_of(model)[variant] for model in (before, after)}
    return [
        Example(
            index=int(index),
            change=name,
            truth=names[answers.label[index]],
            word=str(answers.written[index]),
            before=names[predicted[before][index]],
            after=names[predicted[after][index]],
        )
        for name in pools
        for index in pools[name][: taken[name]]
    ]


def before_after_grid(
    examples: Sequence[Example],
    path: str | os.PathLike[str],
    *,
    picture: Callable[[int], Image.Image],
    title: str = "Before and after preference optimization",
    subtitle: str = "",
    columns: int = 4,
    font: str | None = None,
) -> Path:
    """Save a PNG of attacked images with the answers before and after alignment, right and wrong in colour.

    Args:
        examples: From `choose_examples`.
        path: The file. Missing folders are created.
        picture: Function that returns the image of an index, such as `RobustnessImages.picture`.
        title: Heading.
        subtitle: Line below the heading, such as `changes_line`.
        columns: Largest number of images side by side, >= 1.
        font: As in `load_font`. None for Pillow's own font, or the first of `training_fonts` that has all letters if
            that lacks some.

    Returns:
        The path.

    Raises:
        ValueError: If there are no examples, or `columns` < 1.
    """
    if not examples:
        raise ValueError("There are no examples to show: both models answer every attacked image correctly.")
    check_number("columns", columns, COUNT)
    shown = title + subtitle + "".join(e.truth + e.word + e.before + e.after for e in examples)
    font = font or min(training_fonts(), key=lambda name: len(missing_letters(shown, name)))
    across = min(columns, len(examples))
    down = -(-len(examples) // across)
    # At least two cards wide, so that the header fits.
    width = 2 * _MARGIN + max(2, across) * (_CARD_WIDTH + _GAP) - _GAP
    height = _HEADER + _MARGIN + down * (_CARD_HEIGHT + _GAP) - _GAP
    page = Image.new("RGB", (width, height), _PAGE)
    _header(page, title, subtitle, font, _LEGEND if any(example.word for example in examples) else _LEGEND_WITHOUT)
    for number, example in enumerate(examples):
        x = _MARGIN + number % across * (_CARD_WIDTH + _GAP)
        y = _HEADER + number // across * (_CARD_HEIGHT + _GAP)
        _card(page, (x, y), example, picture(example.index), font)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target, format="PNG", optimize=True)
    return target


def _header(page: Image.Image, title: str, subtitle: str, font: str, legend: Mapping[str, Colour]) -> None:
    draw, room = ImageDraw.Draw(page), page.width - 2 * _MARGIN
    for text, sizes, y, colour, stroke in (
        (title, (34, 30, 26), 52, _INK, 0.4),
        (subtitle, (17, 15, 13, 11), 92, _QUIET, 0),
    ):
        # Use a smaller font on a narrow page, because cut-off numbers would mislead.
        fonts = [load_font(font, size) for size in sizes]
        fitting = next((f for f in fonts if f.getlength(text) <= room), fonts[-1])
        draw.text((_MARGIN, y), _cut(text, fitting, room), colour, fitting, anchor="lm", stroke_width=stroke)
    small = load_font(font, 17)
    x, y = _MARGIN, 124
    for name, colour in legend.items():
        _smooth(page, (x, y - 7, x + 14, y + 7), colour, lambda pen: pen.ellipse((0, 0, 55, 55), fill=255))
        draw.text((x + 22, y), name, _QUIET, small, anchor="lm")
        x += 22 + round(small.getlength(name)) + 26


def _card(page: Image.Image, corner: tuple[int, int], example: Example, image: Image.Image, font: str) -> None:
    draw = ImageDraw.Draw(page)
    x, y = corner
    _rounded(page, (x, y, x + _CARD_WIDTH, y + _CARD_HEIGHT), 14, _EDGE)
    _rounded(page, (x + 1, y + 1, x + _CARD_WIDTH - 1, y + _CARD_HEIGHT - 1), 13, _CARD)
    x, y = x + _PAD, y + _PAD
    page.paste(_fit(image), (x, y))
    normal, small = load_font(font, 19), load_font(font, 15)
    y += _SIDE + _LINE // 2 + 8
    badge = _BADGES[example.change]
    length = round(small.getlength(example.change))
    _rounded(page, (x, y - 13, x + length + 20, y + 13), 13, _tint(badge))
    draw.text((x + 10, y), example.change, badge, small, anchor="lm")
    rows = [
        ("image", example.truth, _INK),
        ("before", example.before, _colour(example, example.before)),
        ("after", example.after, _colour(example, example.after)),
    ]
    for row, (name, answer, colour) in enumerate(rows):
        baseline = y + (row + 1) * _LINE + 3
        draw.text((x, baseline), name, _QUIET, normal, anchor="lm")
        draw.text(
            (x + 78, baseline), _cut(answer, normal, _SIDE - 78 - 26), colour, normal, anchor="lm", stroke_width=0.3
        )
        if row:
            _mark(page, (x + _SIDE - 10, baseline), answer == example.truth, colour)


def _colour(example: Example, answer: str) -> Colour:
    if answer == example.truth:
        return _RIGHT
    return _WORD if spelling(answer) == spelling(example.word) else _OTHER


def _mark(page: Image.Image, center: tuple[int, int], right: bool, colour: Colour) -> None:
    """Draw a tick or a cross, for readers who cannot distinguish the colours. Few fonts have these characters."""
    x, y = center
    strokes = [[(6, 34), (24, 52), (58, 12)]] if right else [[(10, 10), (54, 54)], [(10, 54), (54, 10)]]

    def paint(pen: ImageDraw.ImageDraw) -> None:
        for stroke in strokes:
            pen.line(stroke, 255, 10, joint="curve")

    _smooth(page, (x - 8, y - 8, x + 8, y + 8), colour, paint)


def _smooth(
    page: Image.Image, box: tuple[int, int, int, int], colour: Colour, paint: Callable[[ImageDraw.ImageDraw], None]
) -> None:
    """Paint a shape with smooth edges. `paint` draws it at four times the size, in white on black."""
    size = (box[2] - box[0], box[3] - box[1])
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    paint(ImageDraw.Draw(mask))
    page.paste(colour, box, mask.resize(size, Image.Resampling.BOX))


def _rounded(page: Image.Image, box: tuple[int, int, int, int], radius: int, colour: Colour) -> None:
    corner = (4 * (box[2] - box[0]) - 1, 4 * (box[3] - box[1]) - 1)
    _smooth(page, box, colour, lambda pen: pen.rounded_rectangle((0, 0, *corner), 4 * radius, fill=255))


def _fit(image: Image.Image) -> Image.Image:
    """Return the whole image in a square tile. Tiny images are enlarged without smoothing."""
    image = image.convert("RGB")
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    way = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BICUBIC
    tile = Image.new("RGB", (_SIDE, _SIDE), _FRAME)
    tile.paste(image.resize(size, way), ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return tile


def _tint(colour: Colour) -> Colour:
    red, green, blue = (round(255 - 0.13 * (255 - part)) for part in colour)
    return red, green, blue


def _cut(text: str, font: Font, room: float) -> str:
    """Return the text, shortened to a width in pixels with dots at the end."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."
