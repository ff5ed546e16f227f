"""A self-contained HTML report of one run."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from clip_po.atomic_write import atomic_write
from clip_po.data.attacks.words import spelling
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.before_after import CHANGES, Example
from clip_po.evaluation.report.figures import figure_svg
from clip_po.evaluation.report.plots import format_seconds
from clip_po.evaluation.report.report_file import report_estimates
from clip_po.evaluation.report.summary import (
    MEANINGS,
    Found,
    base_of,
    data_name,
    digits_of,
    flat,
    headline_of,
    last_part,
    sentence,
)
from clip_po.evaluation.robustness import COLUMNS
from clip_po.evaluation.tables import UNDEFINED, format_estimate, format_number

_FOLDER = Path(str(files("clip_po"))) / "assets" / "page"
_SIDE = 384  # Longest side of a thumbnail, in pixels.
_SMALL = 96  # Images up to this side, in pixels, are embedded without loss and shown enlarged.
_POINTS = "clean_cost"
_REQUIRED = ("clean_accuracy", "typographic_accuracy", "fooled")
_ACROSS = 3  # Largest number of models shown as columns, which still fit on a phone.


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page.

    Attributes:
        name: Name of the metric.
        value: The number.
        interval: Its interval, or an empty string.
        note: A line below the number, such as the value before alignment.
    """

    name: str
    value: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Header of the row.
        cells: Value and interval of each column.
        note: A line below the name.
        marked: Whether the row is highlighted.
    """

    name: str
    cells: Sequence[tuple[str, str]]
    note: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table of numbers.

    Attributes:
        caption: Heading of the table.
        columns: Column headers, starting with the header of the row names.
        rows: The rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        caption: Caption, which screen readers read in place of the plot.
        svg: From `figure_svg`.
    """

    caption: str
    svg: str


@dataclass(frozen=True)
class ExampleCard:
    """An example with its image.

    Attributes:
        example: The answers before and after alignment.
        image: The image as a data URI.
        pixelated: Whether the image is enlarged without smoothing.
    """

    example: Example
    image: str
    pixelated: bool = False

    def verdict(self, answer: str) -> str:
        """Classify an answer.

        Args:
            answer: Name of the predicted class.

        Returns:
            "right" for the true class, "word" for the written word, "other" for any other answer.
        """
        if answer == self.example.truth:
            return "right"
        return "word" if spelling(answer) == spelling(self.example.word) else "other"


@dataclass(frozen=True)
class Page:
    """The content of a page, from top to bottom.

    Attributes:
        title: Heading.
        about: Command, data, date and duration, in one line.
        summary: The result in words.
        tiles: Key figures.
        tables: Tables of metrics with intervals.
        plots: Plots.
        examples: Attacked images with the answers before and after alignment.
        examples_note: Number of images per kind of change, shown above the examples.
        details: Collapsible sections by heading, each with rows of name and value.
        footer: Last line.
    """

    title: str
    about: str
    summary: str
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    examples: Sequence[ExampleCard] = ()
    examples_note: str = ""
    details: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    footer: str = ""


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write a page as one HTML file, without scripts and without references to other files.

    Args:
        path: The file, written atomically. Missing folders are created.
        page: From `report_page`.

    Returns:
        The path.

    Raises:
        OSError: If the folder is not writable or the disk is full.
    """
    cards = {change: [card for card in page.examples if card.example.change == change] for change in CHANGES}
    text = _template().render(
        page=page,
        style=(_FOLDER / "style.css").read_text(encoding="utf-8"),
        examples={change: shown for change, shown in cards.items() if shown},
    )
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def report_page(
    report: Mapping[str, Any],
    *,
    examples: Sequence[Example] = (),
    picture: Callable[[int], Image.Image] | None = None,
    changes: str = "",
    figures: Mapping[str, Figure] | None = None,
) -> Page:
    """Build the page of a report of one model, of one model before and after alignment, or of several methods.

    If other models have a recovery, the base is the model without one. The summary in words describes the model that
    the settings name as `chosen`, or else the model with the highest recovery.

    Args:
        report: From `read_report`.
        examples: From `choose_examples`.
        picture: Function that returns the image of an example's index, such as `RobustnessImages.picture`.
        changes: From `changes_line`, shown above the examples.
        figures: Plots by caption.

    Returns:
        The page.

    Raises:
        ValueError: If there are examples but no `picture`, or the report has no models or no accuracies.
    """
    if examples and picture is None:
        raise ValueError(
            f"picture is missing. Pass a function that returns the images of the {len(examples)} examples."
        )
    found = report_estimates(report)
    if not found:
        raise ValueError("The report has no models. Pass a report.json of clip-po evaluate, demo or compare.")
    base, model = base_of(found), headline_of(report, found)
    missing = [name for name in _REQUIRED if name not in found[model]]
    if missing:
        raise ValueError(f"{model!r} has no {missing}, only {list(found[model])}. Pass a robustness report.")
    seconds, created = report.get("seconds"), datetime.fromisoformat(report["created"])
    about = [
        f"clip-po {report['command']}",
        data_name(report.get("data") or {}),
        f"{created.day} {created:%B %Y, %H:%M} UTC",
        "" if seconds is None else format_seconds(seconds),
    ]
    return Page(
        title=_title(report, found, base, model),
        about=" · ".join(part for part in about if part),
        summary=sentence(report.get("settings") or {}, found, base, model),
        tiles=_tiles(found, base, model),
        tables=[_table(found, base, model)],
        plots=[Plot(caption, figure_svg(figure)) for caption, figure in (figures or {}).items()],
        examples=[_card(example, picture(example.index)) for example in examples] if picture else [],
        examples_note=changes,
        details=_details(report, found),
        footer=f"Written by clip_po {report['clip_po_version']} from report.json. Brackets hold 95% intervals.",
    )


@functools.cache
def _template() -> Any:
    loader = FileSystemLoader(_FOLDER)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _title(report: Mapping[str, Any], found: Found, base: str | None, model: str) -> str:
    others = [name for name in found if name != base]
    if len(others) > 1:
        return f"Typographic robustness of {len(others)} models"
    name = (report.get("settings") or {}).get("model_name_or_path")
    return f"Typographic robustness of {last_part(str(name)) if name else model}"


def _tiles(found: Found, base: str | None, model: str) -> list[Tile]:
    now, was = found[model], found[base] if base else {}
    names = ("recovery", _POINTS, "typographic_accuracy", "fooled") if base else tuple(COLUMNS)[:4]
    notes = {name: f"before {format_number(was[name].value, digits_of(was[name]))}" for name in names if name in was}
    notes["recovery"] = "of what the words cost"
    if base:
        clean = [format_number(row["clean_accuracy"].value, 3) for row in (was, now)]
        notes[_POINTS] = f"from {clean[0]} to {clean[1]}"
    return [
        Tile(
            COLUMNS[name],
            *_parts(now[name], 1 if name == _POINTS else digits_of(now[name])),
            notes.get(name, ""),
        )
        for name in names
        if name in now
    ]


def _parts(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """Return a number and its interval as separate strings."""
    if estimate is None:
        return UNDEFINED, ""
    value, _, interval = format_estimate(estimate, digits).partition(" ")
    return value, interval


def _table(found: Found, base: str | None, model: str) -> Table:
    """Return the table of metrics, with few models as columns and many models as rows."""
    metrics = _metrics(found)
    digits = {name: 2 if name == _POINTS else 3 for name in metrics}
    if len(found) <= _ACROSS:
        rows = [
            Row(COLUMNS[name], [_parts(row.get(name), digits[name]) for row in found.values()], MEANINGS[name])
            for name in metrics
        ]
        return Table("Before and after, 95% intervals" if base else "95% intervals", ["", *found], rows)
    rows = [
        Row(name, [_parts(row.get(metric), digits[metric]) for metric in metrics], marked=name == model)
        for name, row in found.items()
    ]
    return Table("All models, 95% intervals", ["model", *(COLUMNS[name] for name in metrics)], rows)


def _card(example: Example, image: Image.Image) -> ExampleCard:
    image = image.convert("RGB")
    file, kind = io.BytesIO(), "png"
    pixelated = max(image.size) <= _SMALL
    if pixelated:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return ExampleCard(example, f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", pixelated)


def _details(report: Mapping[str, Any], found: Found) -> dict[str, list[tuple[str, str]]]:
    settings = list(flat(report.get("settings") or {}))
    hardware = dict(report.get("hardware") or {})
    if not hardware.get("accelerators"):
        hardware["accelerators"] = "none"
    seconds = report.get("seconds")
    sections = {
        "What the numbers mean": [(COLUMNS[name], MEANINGS[name]) for name in _metrics(found)],
        "Data": list(flat(report.get("data") or {})),
        "Settings": settings,
        "Seeds": [(name, value) for name, value in settings if name.rpartition(".")[2].endswith("seed")],
        "Versions": [("clip_po", str(report["clip_po_version"])), *flat(report.get("versions") or {})],
        "Hardware and time": [
            *flat(hardware),
            ("wall time", UNDEFINED if seconds is None else format_seconds(seconds)),
            ("written", str(report["created"])),
        ],
    }
    return {heading: rows for heading, rows in sections.items() if rows}


def _metrics(found: Found) -> list[str]:
    """Return the metrics that at least one model has, in the order of the columns."""
    return [name for name in COLUMNS if any(name in row for row in found.values())]
