"""The tables and plots of people.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.plots import sweep_plot
from clip_po.evaluation.tables import format_table


def bias_tables(found: Mapping[str, Mapping[str, Estimate]], k: int, chance: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table by gender, and the table of race, intersections and what was kept."""
    skew = f"max_skew@{k}"
    first = ["all: {}", "all: {}_reduction"]
    gender = [
        [
            name,
            *(metrics.get(column.format(key)) for key in (skew, "ndkl") for column in first),
            *(metrics[f"{part}: {key}"].value for part in ("seen", "never seen") for key in (skew, "ndkl")),
        ]
        for name, metrics in found.items()
    ]
    gender.append(["random order", chance["all"][skew], None, chance["all"]["ndkl"], *[None] * 5])
    heads = [
        "",
        f"MaxSkew@{k}",
        "less (%)",
        "NDKL",
        "less (%)",
        "MaxSkew, first three",
        "NDKL",
        "MaxSkew, others",
        "NDKL",
    ]
    parts, sets = ("race", "race and gender"), ("man or woman", "things")
    rest = [
        [
            name,
            *(metrics[f"{part}: {key}"].value for part in parts for key in (skew, "ndkl")),
            *(metrics.get(f"{kept}: {key}") for kept in sets for key in ("accuracy", "retention_cost")),
        ]
        for name, metrics in found.items()
    ]
    rest.append(["random order", *(chance[part][key] for part in parts for key in (skew, "ndkl")), *[None] * 4])
    others = ["", "race: MaxSkew", "NDKL", "race and gender: MaxSkew", "NDKL"]
    others += [head for kept in sets for head in (kept, "cost (points)")]
    return f"{format_table(heads, gender)}\n\n{format_table(others, rest)}"


def steering_table(found: Mapping[float, Mapping[str, Estimate]]) -> str:
    """Return the table of the scales."""
    keys = ("man or woman: accuracy", "groups: accuracy", "groups: retention_cost")
    rows = [
        [f"{t:g}", *(m[key] for key in (*keys, "things: accuracy", "things: retention_cost"))]
        for t, m in found.items()
    ]
    return format_table(["t", "man or woman", "age", "cost (points)", "things", "cost (points)"], rows)


def draw_plots(
    folder: Path,
    steps: Sequence[float],
    curves: Mapping[str, list[float]],
    steered: Mapping[float, Mapping[str, Estimate]],
) -> None:
    """Write the plots: NDKL by step on the faces left out, and accuracies by t."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: [Estimate(value) for value in curve] for name, curve in curves.items()}
    sweep_plot(steps, drawn, xlabel="share of the weights, or t", ylabel="NDKL").savefig(folder / "people_bias.png")
    lines = {
        label: [metrics[f"{name}: accuracy"] for metrics in steered.values()]
        for name, label in (("man or woman", "man or woman"), ("groups", "age"), ("things", "things"))
    }
    sweep_plot(list(steered), lines, xlabel="t").savefig(folder / "people_steer.png")
