"""The tables of a report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.report_file import report_estimates
from clip_po.evaluation.report.retention_report import COLUMNS as RETENTION_COLUMNS
from clip_po.evaluation.report.retention_report import class_rows, retention_rows
from clip_po.evaluation.report.summary import MEANINGS, Found
from clip_po.evaluation.robustness import COLUMNS
from clip_po.evaluation.tables import UNDEFINED, format_estimate, format_number

POINTS = "clean_cost"
"""The metric of `robustness_table` in percentage points."""

_ACROSS = 3  # Largest number of models shown as columns, which still fit on a phone.


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


def robustness_page_table(found: Found, base: str | None, model: str) -> Table:
    """Return the table of metrics, with few models as columns and many models as rows.

    Args:
        found: Estimates by model and metric.
        base: Name of the model before alignment; None if there is none.
        model: Name of the model to highlight.

    Returns:
        The table.
    """
    metrics = measured_columns(found)
    digits = {name: 2 if name == POINTS else 3 for name in metrics}
    if len(found) <= _ACROSS:
        rows = [
            Row(COLUMNS[name], [parts(row.get(name), digits[name]) for row in found.values()], MEANINGS[name])
            for name in metrics
        ]
        return Table("Before and after, 95% intervals" if base else "95% intervals", ["", *found], rows)
    rows = [
        Row(name, [parts(row.get(metric), digits[metric]) for metric in metrics], marked=name == model)
        for name, row in found.items()
    ]
    return Table("All models, 95% intervals", ["model", *(COLUMNS[name] for name in metrics)], rows)


def retention_page_tables(section: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what was kept of other tasks, and of the classes that lost or won most.

    Args:
        section: The section of a report, as for `class_rows`.

    Returns:
        One table of all sets, and one for each set of which a class changed.
    """
    rows = retention_rows(report_estimates(section), section["sets"])
    kept = [number for number in range(len(RETENTION_COLUMNS)) if any(row[3][number] is not None for row in rows)]
    headers = list(RETENTION_COLUMNS.values())
    digits = [2 if name == "retention_cost" else 3 for name in RETENTION_COLUMNS]
    lines = [
        Row(f"{name}, {model}", [parts(cells[n], digits[n]) for n in kept], f"{images:,} images")
        for name, images, model, cells in rows
    ]
    tables = [Table("Other tasks, 95% intervals", ["set", *(headers[n] for n in kept)], lines)]
    for name, changes in class_rows(section).items():
        lines = [
            Row(
                change.name,
                [(format_number(change.before), ""), (format_number(change.after), ""), parts(change.cost, 1)],
                f"{change.lost:,} lost and {change.won:,} won of {change.images:,} images",
            )
            for change in changes
        ]
        heading = f"Classes of {name} that lost or won most"
        tables.append(Table(heading, ["class", "before", "after", "cost (points)"], lines))
    return tables


def parts(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """Return a number and its interval as separate strings.

    Args:
        estimate: The estimate; None if it was not measured.
        digits: Number of decimals.

    Returns:
        The number, and the interval or "".
    """
    if estimate is None:
        return UNDEFINED, ""
    value, _, interval = format_estimate(estimate, digits).partition(" ")
    return value, interval


def measured_columns(found: Found) -> list[str]:
    """Return the metrics that at least one model has.

    Args:
        found: Estimates by model and metric.

    Returns:
        Names of metrics, in the order of the columns of `robustness_table`.
    """
    return [name for name in COLUMNS if any(name in row for row in found.values())]
