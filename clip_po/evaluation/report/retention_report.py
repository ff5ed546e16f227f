"""The section of a report on other tasks: what was kept of each set, and which classes lost or won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.per_class import ClassChange
from clip_po.evaluation.report.report_file import read_estimate, report_estimates
from clip_po.evaluation.tables import format_table

COLUMNS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "retention_cost": "retention cost (points)",
    "kl": "drift (nats)",
    "agreement": "same answer",
    "cosine": "cosine",
}
"""Metrics in the order of the table, with the headers of their columns."""

MEANINGS: Mapping[str, str] = {
    "accuracy": "right answers on clean images of the set, among its classes",
    "retention_cost": "accuracy lost against the base, in percentage points",
    "kl": "KL(base || model) over the open vocabulary, mean over the images",
    "agreement": "share of images whose most probable text of the open vocabulary is the base's",
    "cosine": "mean cosine of the image embedding with the base's",
}
"""Meanings of the columns, one line each."""

MOST_CLASSES = 10
"""Largest number of classes that a report lists as lost, and as won, of each set."""


def retention_section(
    models: Mapping[str, Mapping[str, Estimate]],
    sets: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Sequence[ClassChange]],
    texts: int,
) -> dict[str, Any]:
    """Return the section of report.json on other tasks.

    Args:
        models: By model, estimates as from `scores_report`.
        sets: What each set is, with at least `rows`, its number of images.
        classes: By set with labels, changes as from `class_changes`.
        texts: Number of texts of the open vocabulary.

    Returns:
        The section, for `write_report`.
    """
    shown = {name: {"lost": _largest(found), "won": _largest(found[::-1], -1)} for name, found in classes.items()}
    return {"texts": texts, "sets": sets, "models": models, "classes": shown}


def _largest(changes: Sequence[ClassChange], sign: int = 1) -> list[ClassChange]:
    return [change for change in changes if sign * change.cost.value > 0][:MOST_CLASSES]


def retention_rows(
    models: Mapping[str, Mapping[str, Estimate]], sets: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, int, str, list[Estimate | None]]]:
    """Return a row for each set and model, and for the mean over several sets.

    Args:
        models: By model, estimates as from `scores_report`.
        sets: As for `retention_section`.

    Returns:
        Name of the set, number of images, name of the model, and one estimate per column of `COLUMNS`.
    """
    total = sum(about["rows"] for about in sets.values())
    parts = [(name, f"{name}: ", about["rows"]) for name, about in sets.items()]
    parts += [("mean over the sets", "", total)] if len(sets) > 1 else []
    return [
        (name, images, model, cells)
        for name, prefix, images in parts
        for model, metrics in models.items()
        if any(cells := [metrics.get(f"{prefix}{metric}") for metric in COLUMNS])
    ]


def class_rows(section: Mapping[str, Any]) -> dict[str, list[ClassChange]]:
    """Return the classes of each set that lost most, followed by those that won most.

    Args:
        section: The section of a report as from `read_report`.

    Returns:
        Changes by set, without sets of which no class lost or won.
    """
    return {
        name: [
            ClassChange(**{**row, "cost": read_estimate(row["cost"])}) for row in (*shown["lost"], *shown["won"][::-1])
        ]
        for name, shown in section["classes"].items()
        if shown["lost"] or shown["won"]
    }


def retention_table(models: Mapping[str, Mapping[str, Estimate]], sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Format what was kept of other tasks as a Markdown table.

    Args:
        models: As for `retention_rows`.
        sets: As for `retention_rows`.

    Returns:
        One row per set and model, with intervals in brackets.
    """
    rows = [[name, images, model, *cells] for name, images, model, cells in retention_rows(models, sets)]
    kept = [3 + number for number, name in enumerate(COLUMNS) if any(row[3 + number] is not None for row in rows)]
    headers = ["other tasks", "images", "model", *COLUMNS.values()]
    return format_table([headers[n] for n in (0, 1, 2, *kept)], [[row[n] for n in (0, 1, 2, *kept)] for row in rows])


def retention_summary(section: Mapping[str, Any]) -> str:
    """Summarize the section for a model card.

    Args:
        section: As for `class_rows`.

    Returns:
        Markdown without headings: the table, and the classes of each set that lost or won most.
    """
    lines = [retention_table(report_estimates(section), section["sets"]), "", describe_vocabulary(section["texts"])]
    for name, changes in class_rows(section).items():
        rows = [(c.name, c.images, c.lost, c.won, c.before, c.after, c.cost) for c in changes]
        table = format_table(["class", "images", "lost", "won", "before", "after", "cost (points)"], rows)
        lines += ["", f"Classes of {name} that lost or won most:", "", table]
    return "\n".join(lines)


def describe_vocabulary(texts: int) -> str:
    """Say over how many texts the drift runs.

    Args:
        texts: Number of texts of the open vocabulary.

    Returns:
        One sentence.
    """
    return f"Drift is KL(base || model) over {texts:,} texts; same answer and cosine are against the base."
