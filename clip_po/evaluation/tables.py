"""Formatting of numbers, estimates and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clip_po.evaluation.bootstrap import Estimate
from clip_po.hub.markdown import escape_markdown

UNDEFINED = "n/a"


def format_number(value: float, digits: int = 3) -> str:
    """Format a number as papers print it, such as .934, -.020 or 12.500.

    Args:
        value: Any number.
        digits: Number of decimals, >= 0.

    Returns:
        The text; "n/a" for NaN and infinite values.
    """
    if not math.isfinite(value):
        return UNDEFINED
    text = f"{value:.{digits}f}"
    sign, size = ("-", text[1:]) if text.startswith("-") else ("", text)
    if not size.strip("0."):  # The value rounds to zero, and "-.000" would read like a loss.
        sign = ""
    return sign + (size[1:] if size.startswith("0.") else size)


def format_estimate(estimate: Estimate, digits: int = 3) -> str:
    """Format an estimate with its interval, such as `.934 [.921, .945]`.

    Args:
        estimate: The estimate.
        digits: Number of decimals, >= 0.

    Returns:
        The text, without an interval if the estimate has none.
    """
    value, low, high = (format_number(part, digits) for part in (estimate.value, estimate.low, estimate.high))
    return value if UNDEFINED in (low, high) else f"{value} [{low}, {high}]"


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[Estimate | str | float | None]], digits: int = 3
) -> str:
    """Format an aligned Markdown table that is also readable in a terminal.

    Args:
        columns: Column headers.
        rows: Cells of each row, one per header. Estimates and floats are rounded, integers and strings are kept
            unchanged, and None becomes "n/a". Columns without strings are right-aligned.
        digits: Number of decimals, >= 0.

    Returns:
        The table, without a newline at the end.

    Raises:
        ValueError: If the number of cells in a row differs from the number of headers.
    """
    for position, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"Row {position} has {len(row)} cells for the {len(columns)} columns {columns}.")
    numeric = [bool(rows) and not any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    lines = [list(columns), *([_cell(cell, digits) for cell in row] for row in rows)]
    lines = [[escape_markdown(cell) for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]

    def join(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    aligned = [
        join([c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)])
        for line in lines
    ]
    rule = join(["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)])
    return "\n".join([aligned[0], rule, *aligned[1:]])


def _cell(cell: Estimate | str | float | None, digits: int) -> str:
    if cell is None:
        return UNDEFINED
    if isinstance(cell, Estimate):
        return format_estimate(cell, digits)
    if isinstance(cell, (float, np.floating)):
        return format_number(float(cell), digits)
    return str(cell)
