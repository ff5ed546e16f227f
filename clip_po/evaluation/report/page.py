"""One HTML page that says what a run measured, whole in itself: it opens from a disk, a mail or a printer."""

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
_SIDE, _SMALL = 384, 96  # pixels: of a thumbnail at most; below which an image is embedded without loss
_POINTS = "clean_cost"
_NEEDED = ("clean_accuracy", "typographic_accuracy", "fooled")
_ACROSS = 3  # models that stand side by side with the metrics below one another, as on a phone


@dataclass(frozen=True)
class Tile:
    """A key figure.

    Attributes:
        name: What was measured.
        value: The number.
        interval: Its interval; empty where there is none.
        note: A line below, such as the number before alignment.
    """

    name: str
    value: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: What heads it.
        cells: Value and interval of each column.
        note: A line below the name.
        marked: The row stands out.
    """

    name: str
    cells: Sequence[tuple[str, str]]
    note: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers by row and column.

    Attributes:
        caption: What they are.
        columns: Heads of the columns, that of the rows' names first.
        rows: The rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        caption: What it shows; read aloud in its place.
        svg: From `figure_svg`.
    """

    caption: str
    svg: str


@dataclass(frozen=True)
class Shown:
    """An example with its image.

    Attributes:
        example: What was said about it.
        image: Data URI.
        pixelated: The image is so small that its pixels are to be seen.
    """

    example: Example
    image: str
    pixelated: bool = False

    def verdict(self, said: str) -> str:
        """Whether an answer is "right", the written "word", or wrong as "other"."""
        if said == self.example.truth:
            return "right"
        return "word" if said.casefold() == self.example.word.casefold() else "other"


@dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom.

    Attributes:
        title: Heading.
        about: Command, data, time, in a line.
        summary: What came out, in words.
        tiles: Key figures.
        tables: Numbers with their intervals.
        plots: Plots.
        examples: Attacked images with the answers before and after.
        examples_note: How many images changed, above the examples.
        details: Sections that open: rows of name and value, by heading.
        footer: Last line.
    """

    title: str
    about: str
    summary: str
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    examples: Sequence[Shown] = ()
    examples_note: str = ""
    details: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    footer: str = ""


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write a page that needs nothing beside it: no script, font, image or style from elsewhere.

    Args:
        path: The file; missing folders are made. It appears whole or not at all.
        page: From `report_page`.

    Returns:
        The path.
    """
    shown = {change: [one for one in page.examples if one.example.change == change] for change in CHANGES}
    text = _template().render(
        page=page,
        style=(_FOLDER / "style.css").read_text(encoding="utf-8"),
        examples={change: cards for change, cards in shown.items() if cards},
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def report_page(
    report: Mapping[str, Any],
    *,
    examples: Sequence[Example] = (),
    picture: Callable[[int], Image.Image] | None = None,
    changes: str = "",
    figures: Mapping[str, Figure] | None = None,
) -> Page:
    """The page of a report: of one model, of one before and after alignment, or of several methods.

    The base is the model without a recovery among others that have one. What is told in words is the model that
    the settings name as `chosen`, or else the one with the highest recovery.

    Args:
        report: From `read_report`.
        examples: From `pictures.choose_examples`.
        picture: Gives the image of an example's index, as `RobustnessImages.picture` does.
        changes: From `pictures.changes_line`, to stand above the examples.
        figures: Plots by their captions.

    Returns:
        The page.

    Raises:
        ValueError: Examples without `picture`; a report without models, or without accuracies.
    """
    if examples and picture is None:
        raise ValueError(f"picture is missing: it gives the images of the {len(examples)} examples.")
    found = report_estimates(report)
    if not found:
        raise ValueError("The report holds no models; give a report.json of evaluate, demo or compare.")
    base, model = base_of(found), headline_of(report, found)
    missing = [name for name in _NEEDED if name not in found[model]]
    if missing:
        raise ValueError(f"{model!r} has no {missing}, only {list(found[model])}; give a report of robustness.")
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
        examples=[_shown(example, picture(example.index)) for example in examples] if picture else [],
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
    """A number and its interval, apart."""
    if estimate is None:
        return UNDEFINED, ""
    value, _, interval = format_estimate(estimate, digits).partition(" ")
    return value, interval


def _table(found: Found, base: str | None, model: str) -> Table:
    """Models side by side where there are few, else below one another."""
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


def _shown(example: Example, image: Image.Image) -> Shown:
    image = image.convert("RGB")
    file, kind = io.BytesIO(), "png"
    pixelated = max(image.size) <= _SMALL
    if pixelated:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return Shown(example, f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", pixelated)


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
    """The metrics that any model has, in the order of the columns."""
    return [name for name in COLUMNS if any(name in row for row in found.values())]
