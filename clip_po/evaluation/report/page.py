"""A self-contained HTML report of one run."""

from __future__ import annotations

import functools
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
from clip_po.evaluation.report.before_after import Example, Gallery
from clip_po.evaluation.report.figures import figure_svg
from clip_po.evaluation.report.page_cards import CardGallery, card_gallery
from clip_po.evaluation.report.page_tables import (
    POINTS,
    Table,
    measured_columns,
    parts,
    retention_page_tables,
    robustness_page_table,
)
from clip_po.evaluation.report.plots import format_seconds
from clip_po.evaluation.report.report_file import report_estimates
from clip_po.evaluation.report.retention_report import COLUMNS as RETENTION_COLUMNS
from clip_po.evaluation.report.retention_report import MEANINGS as RETENTION_MEANINGS
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
from clip_po.evaluation.tables import UNDEFINED, format_number

_FOLDER = Path(str(files("clip_po"))) / "assets" / "page"
_REQUIRED = ("clean_accuracy", "typographic_accuracy", "fooled")


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
class Plot:
    """A plot.

    Attributes:
        caption: Caption, which screen readers read in place of the plot.
        svg: From `figure_svg`.
    """

    caption: str
    svg: str


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
        galleries: Images with the answers before and after alignment.
        details: Collapsible sections by heading, each with rows of name and value.
        footer: Last line.
    """

    title: str
    about: str
    summary: str
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    galleries: Sequence[CardGallery] = ()
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
    text = _template().render(page=page, style=(_FOLDER / "style.css").read_text(encoding="utf-8"))
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
    galleries: Sequence[Gallery] = (),
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
        galleries: More images with answers before and after, such as from `changed_answers`.

    Returns:
        The page.

    Raises:
        ValueError: If there are examples but no `picture`, or the report has no models or no accuracies.
    """
    if examples and picture is None:
        raise ValueError(
            f"picture is missing. Pass a function that returns the images of the {len(examples)} examples."
        )
    first = [Gallery("Examples", changes, examples, picture)] if examples and picture is not None else []
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
        tables=[robustness_page_table(found, base, model), *_retention_tables(report)],
        plots=[Plot(caption, figure_svg(figure)) for caption, figure in (figures or {}).items()],
        galleries=[card_gallery(gallery) for gallery in (*first, *galleries)],
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
    names = ("recovery", POINTS, "typographic_accuracy", "fooled") if base else tuple(COLUMNS)[:4]
    notes = {name: f"before {format_number(was[name].value, digits_of(was[name]))}" for name in names if name in was}
    notes["recovery"] = "of what the words cost"
    if base:
        clean = [format_number(row["clean_accuracy"].value, 3) for row in (was, now)]
        notes[POINTS] = f"from {clean[0]} to {clean[1]}"
    return [
        Tile(
            COLUMNS[name],
            *parts(now[name], 1 if name == POINTS else digits_of(now[name])),
            notes.get(name, ""),
        )
        for name in names
        if name in now
    ]


def _retention_tables(report: Mapping[str, Any]) -> list[Table]:
    return retention_page_tables(report["retention"]) if "retention" in report else []


def _retention_meanings(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "retention" not in report:
        return []
    section = report["retention"]
    meanings = [(header, RETENTION_MEANINGS[name]) for name, header in RETENTION_COLUMNS.items()]
    return [*meanings, ("texts of the open vocabulary", f"{section['texts']:,}"), *flat(section["sets"])]


def _details(report: Mapping[str, Any], found: Found) -> dict[str, list[tuple[str, str]]]:
    settings = list(flat(report.get("settings") or {}))
    hardware = dict(report.get("hardware") or {})
    if not hardware.get("accelerators"):
        hardware["accelerators"] = "none"
    seconds = report.get("seconds")
    sections = {
        "What the numbers mean": [(COLUMNS[name], MEANINGS[name]) for name in measured_columns(found)],
        "What the numbers about other tasks mean": _retention_meanings(report),
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
