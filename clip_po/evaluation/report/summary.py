"""Summaries of a report: sentences for its page, and Markdown for a model card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.report_file import read_report, report_estimates
from clip_po.evaluation.report.retention_report import retention_summary
from clip_po.evaluation.robustness import robustness_table
from clip_po.evaluation.tables import format_estimate, format_number
from clip_po.hub.markdown import escape_markdown

Found = Mapping[str, Mapping[str, Estimate]]
"""Estimates by model and metric, as from `report_estimates`."""

MEANINGS: Mapping[str, str] = {
    "clean_accuracy": "right answers on the images without words",
    "typographic_accuracy": "right answers with a wrong word written on the image",
    "fooled": "answers that repeat the written word",
    "occluded_accuracy": "right answers with a meaningless string in the word's place",
    "reading_effect": "what the word's meaning costs beyond its ink: occluded less typographic accuracy",
    "recovery": "share of the accuracy lost to the words that was won back: 0 none, 1 all",
    "clean_cost": "clean accuracy lost against the base, in percentage points",
}
"""Meanings of the columns of `robustness_table`, one line each."""

MEASUREMENT_SETTINGS = (
    "base_model_name_or_path",
    "prompt_template",
    "renderings",
    "attack.words",
    "attack.fonts",
    "attack.size",
    "attack.places",
    "attack.rotation",
    "attack.sticker",
    "attack.min_side",
    "attack.crop",
    "max_samples",
    "chosen",
    "seed",
)
"""Settings of a measurement that a model card lists."""

_UNSET = ("not set", "none")
_HARD = "\N{NO-BREAK SPACE}"


def markdown_summary(report: Mapping[str, Any]) -> str:
    """Summarize a report for a model card: the table, the data, and the important settings.

    Args:
        report: From `read_report`.

    Returns:
        Markdown without headings.
    """
    data = report.get("data") or {}
    rows, name = data.get("rows"), escape_markdown(data_name(data))
    on = f" on {name}" if name else ""
    on += "" if rows is None else f", {rows:,} images"
    on += f" ({skipped:,} unreadable skipped)" if (skipped := data.get("skipped_rows")) else ""
    settings = dict(flat(report.get("settings") or {}))
    shown = {name: settings[name] for name in MEASUREMENT_SETTINGS if settings.get(name, _UNSET[0]) not in _UNSET}
    lines = [
        robustness_table(report_estimates(report)),
        "",
        f"Measured by `clip-po {report['command']}`{on}; brackets hold 95% intervals.",
    ]
    if "retention" in report:
        lines += ["", retention_summary(report["retention"])]
    if shown:
        lines += ["", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | {escape_markdown(_without_folders(name, value))} |" for name, value in shown.items()]
    return "\n".join(lines)


def measured_table(folder: Path) -> str | None:
    """Summarize the report.json of a folder for a model card.

    Args:
        folder: The folder. It need not exist.

    Returns:
        Markdown as from `markdown_summary`, or None if there is no report.

    Raises:
        ValueError: If the file is not a report of this version, as for `read_report`.
    """
    report = folder / "report.json"
    return markdown_summary(read_report(report)) if report.is_file() else None


def base_of(found: Found) -> str | None:
    """Return the model that the others are compared with: the one without a recovery; None if no model has one.

    Args:
        found: Estimates of the report.

    Returns:
        Name of the first such model, or None.
    """
    compared = [name for name in found if "recovery" in found[name]]
    return next((name for name in found if name not in compared), None) if compared else None


def headline_of(report: Mapping[str, Any], found: Found) -> str:
    """Return the model of the headline: `chosen` in the settings, else the highest recovery, else the last model.

    Args:
        report: From `read_report`.
        found: Its estimates, for at least one model.

    Returns:
        Name of the model. An undefined recovery counts only if all are undefined.
    """
    chosen = (report.get("settings") or {}).get("chosen")
    if chosen in found:
        return str(chosen)
    compared = [name for name in found if "recovery" in found[name]]
    defined = [name for name in compared if math.isfinite(found[name]["recovery"].value)]
    return max(defined, key=lambda name: found[name]["recovery"].value) if defined else (compared or list(found))[-1]


def data_name(data: Mapping[str, Any]) -> str:
    """Return the name and split of the data; empty if the report has no name.

    Args:
        data: The data section of the report.

    Returns:
        Text such as "SCAM (test)".
    """
    name, split = data.get("name"), data.get("split")
    return f"{last_part(str(name))}{f' ({split})' if split else ''}" if name else ""


def last_part(path: str) -> str:
    """Return the last part of an absolute path; a Hub id or any other text unchanged.

    Args:
        path: A path or name.

    Returns:
        The last part, or `path` itself.
    """
    return Path(path).name if os.path.isabs(path) else path


def sentence(settings: Mapping[str, Any], found: Found, base: str | None, model: str) -> str:
    """Describe the result of one model in one or two sentences. No line break separates a number from its interval.

    Args:
        settings: The settings of the report. `chosen` tells whether the model was chosen or picked as the best.
        found: Its estimates.
        base: From `base_of`; None to say only what the words cost the model.
        model: From `headline_of`, not the base.

    Returns:
        Plain text.
    """
    now = found[model]
    if base is None:
        lost = 100 * (now["clean_accuracy"].value - now["typographic_accuracy"].value)
        return (
            f"A word written on the images takes accuracy from {_short(now['clean_accuracy'])} to "
            f"{_short(now['typographic_accuracy'])}, {format_number(lost, 1)} points; the written word is the answer "
            f"on {_short(now['fooled'])} of them."
        )
    was, others = found[base], [name for name in found if name != base]
    lead = "Recovery"
    if len(others) > 1:
        chosen = settings.get("chosen") == model
        # The best of several models looks better than it is on the images that it was picked on.
        lead = f"{model}, {'the one chosen' if chosen else 'picked on these very images as the best'} of {len(others)}"
        lead += ": recovery"
    defined = math.isfinite(now["recovery"].value)
    recovery = _short(now["recovery"]) if defined else "undefined (the words cost the base nothing)"
    return (
        f"{lead} {recovery} {_price(now['clean_cost'])}. With words on the images, accuracy goes from "
        f"{_short(was['typographic_accuracy'])} to {_short(now['typographic_accuracy'])}; the written word is the "
        f"answer on {_short(now['fooled'])} of them, before on {_short(was['fooled'])}."
    )


def _price(cost: Estimate) -> str:
    if cost.value < -0.05:
        gain = Estimate(-cost.value, -cost.high, -cost.low)
        return f"with clean accuracy {format_estimate(gain, 1).replace(' ', _HARD)} points higher"
    return f"at {format_estimate(cost, 1).replace(' ', _HARD)} points of clean accuracy"


def _short(estimate: Estimate) -> str:
    """Format a share for a sentence, with its interval on the same line."""
    return format_estimate(estimate, digits_of(estimate)).replace(" ", _HARD)


def digits_of(share: Estimate) -> int:
    """Return the number of decimals of a share: two, or three if two would show almost nothing.

    Args:
        share: 0..1.

    Returns:
        3 if the absolute value is below 0.01 and not 0, else 2.
    """
    return 3 if 0 < abs(share.value) < 0.01 else 2


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value as text, with its path of names joined by dots.

    Args:
        values: Values of a report, nested or not.
        above: Prefix of the names.

    Yields:
        Name and text of each value, in their order. None becomes "not set", an empty list or mapping "none".
    """
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}.")
        else:
            yield path, _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    return str(value) if not isinstance(value, Mapping) else "none"


def _without_folders(name: str, text: str) -> str:
    """Return a setting for publication: local files and folders are reduced to their last part."""
    return ", ".join(map(last_part, text.split(", "))) if name.endswith(("fonts", "path")) else text
