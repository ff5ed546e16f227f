"""Plots of the gains and costs of alignment. They are deterministic and readable without colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.figures import DPI, GROUND, INK, MARKERS, QUIET, RULE, SERIES, styled
from clip_po.evaluation.report.plot_labels import label_points
from clip_po.evaluation.tables import format_number

_WIDTH, _HEIGHT = 4.8, 3.7  # Inches. A wider figure would be scaled down on a phone, with letters too small to read.
_LABEL = 9  # Font size of labels, in points.
_TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600, 7200, 18_000, 36_000, 86_400)  # Seconds.


def trade_off_plot(
    points: Mapping[str, tuple[Estimate, Estimate]],
    *,
    base: str | None = None,
    allowed_cost: float = 1.0,
    groups: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """Plot clean accuracy (x) against typographic accuracy (y), with intervals as crosses.

    If the base is so far below the other points that they would overlap, it is drawn as an arrowhead at the lower
    edge, with its accuracy as text.

    Args:
        points: Clean and typographic accuracy, 0..1, by name. Labels of up to about twenty names do not overlap.
        base: Name of the model before alignment. A line marks its clean accuracy minus `allowed_cost`.
        allowed_cost: Largest allowed loss of clean accuracy, in percentage points.
        groups: By name, method and group, such as ("DPO", "LoRA"). Points of one method share a colour and a line,
            points of one group share a marker. None for one colour per name.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no points, a value is undefined, or `base` or a name in `groups` is not a point.
    """
    _check({f"clean accuracy of {name}": clean for name, (clean, _) in points.items()})
    _check({f"typographic accuracy of {name}": attacked for name, (_, attacked) in points.items()})
    for name in [*([] if base is None else [base]), *(groups or {})]:
        if name not in points:
            raise ValueError(f"{name!r} is not one of the points {list(points)}.")
    others = {name: pair for name, pair in points.items() if name != base}
    low, high = _limits(attacked for _, attacked in others.values()) if others else (0.0, 1.0)
    below = base is not None and len(others) > 2 and points[base][1].value < low - (high - low)
    groups = groups or {}
    looks = _looks({name: groups.get(name, (name, "")) for name in others})

    with styled():
        figure, axes = _axes(len(points))
        axes.set(xlabel="clean accuracy", ylabel="typographic accuracy")
        axes.set_xlim(_limits(clean for clean, _ in points.values()))
        axes.set_ylim((low, high) if below else _limits(attacked for _, attacked in points.values()))
        labels = {name: (clean.value, attacked.value) for name, (clean, attacked) in others.items()}
        for name, (clean, attacked) in others.items():
            _cross(axes, clean, attacked, *looks[name])
        for method in dict.fromkeys(method for method, _ in groups.values()):
            track = np.array([labels[name] for name in others if groups.get(name, ("",))[0] == method])
            if len(track) > 1:
                colour = next(looks[name][0] for name in others if groups.get(name, ("",))[0] == method)
                axes.plot(*track.T, color=colour, linewidth=1, alpha=0.5, zorder=2)
        if base is not None:
            clean, attacked = points[base]
            guide = clean.value - allowed_cost / 100
            axes.axvspan(axes.get_xlim()[0] - 1, guide, color=RULE, alpha=0.45, linewidth=0, zorder=0)
            axes.axvline(guide, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            _above(axes, guide, f"{base} \N{MINUS SIGN} {allowed_cost:g} point{'' if allowed_cost == 1 else 's'}")
            if below:
                labels[f"{base}: {format_number(attacked.value)}, below"] = (clean.value, low)
                axes.plot(clean.value, low, "v", color=INK, markersize=8, clip_on=False, zorder=4)
            else:
                labels[base] = (clean.value, attacked.value)
                _cross(axes, clean, attacked, INK, "X")
        _legend(axes, {group: looks[name][1] for name, (_, group) in groups.items() if name in looks})
        _label_crosses(axes, labels, points.values())
    return figure


def cost_plot(seconds: Mapping[str, float], recovery: Mapping[str, Estimate]) -> Figure:
    """Plot the duration of each method (x, logarithmic) against its recovery (y).

    Args:
        seconds: Duration of each method in seconds, > 0.
        recovery: Recovery of each method. Methods without seconds are left out.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no methods, a duration is not above 0, or a recovery is missing or undefined.
    """
    for name, duration in seconds.items():
        if not (math.isfinite(duration) and duration > 0):
            raise ValueError(f"seconds of {name!r} are {duration!r}, expected more than 0. Leave out this method.")
        if name not in recovery:
            raise ValueError(f"{name!r} has seconds but no recovery. Methods with a recovery: {list(recovery)}.")
    found = {name: recovery[name] for name in seconds}
    _check({f"recovery of {name}": estimate for name, estimate in found.items()})
    looks = _looks({name: (name, "") for name in found})
    with styled():
        figure, axes = _axes(len(found))
        axes.set(xlabel="time of the alignment", ylabel="recovery", xscale="log")
        low, high = min(seconds.values()) / 1.8, max(seconds.values()) * 1.8
        axes.set_xlim(low, high)
        axes.set_ylim(_limits(found.values()))
        inside = [tick for tick in _TICKS if low <= tick <= high]
        if len(inside) > 1:
            axes.xaxis.set_major_locator(FixedLocator(inside[:: 1 + len(inside) // 8]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
        crosses = {name: (Estimate(seconds[name]), estimate) for name, estimate in found.items()}
        for name, cross in crosses.items():
            _cross(axes, *cross, *looks[name])
        _label_crosses(axes, {name: (seconds[name], e.value) for name, e in found.items()}, crosses.values())
    return figure


def retention_plot(
    costs: Mapping[str, Estimate], recovery: Mapping[str, Estimate], *, allowed_cost: float = 1.0
) -> Figure:
    """Plot the retention cost of each method (x) against its recovery (y), with intervals as crosses.

    Args:
        costs: Accuracy lost on other tasks, in percentage points, by method. A line marks `allowed_cost`.
        recovery: Recovery of each of these methods.
        allowed_cost: Largest allowed retention cost, in percentage points.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no methods, or a cost or recovery is missing or undefined.
    """
    missing = [name for name in costs if name not in recovery]
    if missing:
        raise ValueError(f"The methods {missing} have no recovery. Methods with a recovery: {list(recovery)}.")
    _check({f"retention cost of {name}": cost for name, cost in costs.items()})
    _check({f"recovery of {name}": recovery[name] for name in costs})
    looks = _looks({name: (name, "") for name in costs})
    crosses = {name: (cost, recovery[name]) for name, cost in costs.items()}
    with styled():
        figure, axes = _axes(len(costs))
        axes.set(xlabel="retention cost (points)", ylabel="recovery")
        axes.set_xlim(_limits([*costs.values(), Estimate(0.0), Estimate(allowed_cost)]))
        axes.set_ylim(_limits(recovery[name] for name in costs))
        axes.axvspan(allowed_cost, axes.get_xlim()[1] + 100, color=RULE, alpha=0.45, linewidth=0, zorder=0)
        axes.axvline(allowed_cost, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _above(axes, allowed_cost, f"{allowed_cost:g} point{'' if allowed_cost == 1 else 's'}")
        for name, cross in crosses.items():
            _cross(axes, *cross, *looks[name])
        _label_crosses(axes, {name: (x.value, y.value) for name, (x, y) in crosses.items()}, crosses.values())
    return figure


def sweep_plot(
    positions: Sequence[float],
    curves: Mapping[str, Sequence[Estimate]],
    *,
    xlabel: str,
    ylabel: str = "accuracy",
    chosen: float | None = None,
) -> Figure:
    """Plot curves with their intervals as bands, over a swept number such as alpha or the scale t of a concept.

    Args:
        positions: Values of the swept number, in any order.
        curves: By name, one estimate per position. Undefined estimates leave a gap.
        xlabel: Name of the swept number.
        ylabel: Name of the metric.
        chosen: A position to mark with the values of its estimates, or None.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no positions or no curves, a curve has another length, or `chosen` is not a position.
    """
    if not positions or not curves:
        raise ValueError(f"Nothing to draw: {len(positions)} positions and {len(curves)} curves.")
    for name, curve in curves.items():
        if len(curve) != len(positions):
            raise ValueError(f"The curve {name!r} has {len(curve)} estimates for {len(positions)} positions.")
    if chosen is not None and chosen not in positions:
        raise ValueError(f"chosen={chosen!r} is not one of the positions {list(positions)}.")
    order = np.argsort(positions)
    x = np.asarray(positions, dtype=np.float64)[order]
    with styled():
        figure, axes = _axes(0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        ends = {}
        for number, (name, curve) in enumerate(curves.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            value, low, high = np.array([(e.value, e.low, e.high) for e in curve])[order].T
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, value, color=colour, linewidth=1.8, marker=marker, markersize=4.5, markeredgecolor=GROUND)
            defined = np.flatnonzero(np.isfinite(value))
            if len(defined):
                ends[name] = (float(x[defined[-1]]), float(value[defined[-1]]), colour)
            if chosen is not None:
                at = [curve[place].value for place, position in enumerate(positions) if position == chosen]
                axes.plot([chosen] * len(at), at, "o", color="none", markeredgecolor=colour, markersize=11, zorder=5)
        axes.set_ylim(_limits(estimate for curve in curves.values() for estimate in curve))
        if chosen is not None:
            axes.axvline(chosen, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            numbers = [(name, curve[list(positions).index(chosen)].value) for name, curve in curves.items()]
            values = ", ".join(f"{name} {format_number(value)}" for name, value in numbers)
            _above(axes, chosen, f"chosen {chosen:g}: {values}")
        _label_ends(axes, ends)
    return figure


def format_seconds(seconds: float) -> str:
    """Format a duration in one or two units, such as .25 s, 41 s, 2 min, 1 min 30 s or 1 h 5 min.

    Args:
        seconds: Duration, >= 0.

    Returns:
        The text.
    """
    if seconds < 10:
        return f"{format_number(seconds, 1 if seconds >= 1 else 2).rstrip('0').rstrip('.') or '0'} s"
    whole, unit, small, part = round(seconds), "min", "s", 60
    if whole < 60:
        return f"{whole} s"
    if whole >= 3600:
        whole, unit, small = round(seconds / 60), "h", "min"
    rest = f" {whole % part} {small}" if whole % part else ""
    return f"{whole // part} {unit}{rest}"


def _check(values: Mapping[str, Estimate]) -> None:
    if not values:
        raise ValueError("There are no points to draw.")
    for name, estimate in values.items():
        if not math.isfinite(estimate.value):
            raise ValueError(f"{name} is {estimate.value}. Leave out undefined values.")


def _limits(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """Return the limits of an axis, with a margin beyond every interval."""
    ends = [end for e in estimates for end in (e.value, e.low, e.high) if math.isfinite(end)] or [0.0, 1.0]
    room = 0.1 * (max(ends) - min(ends)) or 0.05
    return min(ends) - room, max(ends) + room


def _axes(points: int) -> tuple[Figure, Axes]:
    """Return a figure and its axes. The figure is taller for many points."""
    height = _HEIGHT + 0.09 * max(0, points - 8)
    figure = Figure(figsize=(_WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    left, bottom, right, top = 0.64 / _WIDTH, 0.52 / height, 0.12 / _WIDTH, 0.28 / height
    axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(_PaperFormatter(useOffset=False))
    return figure, axes


class _PaperFormatter(ScalarFormatter):
    """Tick labels in the style of `format_number`, such as .95."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos).replace("0.", ".", 1) if abs(x) < 1 else super().__call__(x, pos)


def _looks(names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each name, from its method and its group."""
    methods = list(dict.fromkeys(method for method, _ in names.values()))
    groups = list(dict.fromkeys(group for _, group in names.values()))
    return {
        name: (SERIES[methods.index(method) % len(SERIES)], MARKERS[groups.index(group) % len(MARKERS)])
        for name, (method, group) in names.items()
    }


def _cross(axes: Axes, x: Estimate, y: Estimate, colour: str, marker: str) -> None:
    arms: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": 0.35, "zorder": 2}
    axes.plot([x.low, x.high], [y.value, y.value], **arms)
    axes.plot([x.value, x.value], [y.low, y.high], **arms)
    axes.plot(x.value, y.value, marker, color=colour, markersize=7, markeredgecolor=GROUND, zorder=3)


def _above(axes: Axes, x: float, text: str) -> None:
    """Write a note above the axes at position x, inside the figure."""
    share = float(axes.transAxes.inverted().transform(axes.transData.transform((x, 0)))[0])
    side = "left" if share < 1 / 3 else "right" if share > 2 / 3 else "center"
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha=side,
        fontsize=_LABEL,
        color=QUIET,
        parse_math=False,
    )


def _legend(axes: Axes, markers: Mapping[str, str]) -> None:
    """Add a legend of the markers of the groups."""
    if len(markers) < 2:
        return
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=QUIET, markeredgecolor=GROUND, markersize=7, label=group)
        for group, marker in markers.items()
    ]
    axes.legend(handles=handles, loc="lower left", borderaxespad=0.2, handletextpad=0.1)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write the names of curves beside their right ends, moved up where two would overlap."""
    texts = {
        name: axes.annotate(
            name,
            (x, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=_LABEL,
            color=colour,
            fontweight="bold",
            parse_math=False,
        )
        for name, (x, y, colour) in ends.items()
    }
    boxes = {name: text.get_window_extent() for name, text in texts.items()}
    room = max((box.width for box in boxes.values()), default=0) + 16
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, width - min(0.4, room / axes.figure.bbox.width), height))
    above = -math.inf
    for name in sorted(texts, key=lambda name: ends[name][1]):
        at = float(axes.transData.transform(ends[name][:2])[1])
        above = max(at, above + boxes[name].height + 2)
        texts[name].set_position((8, (above - at) * 72 / DPI))


def _label_crosses(
    axes: Axes, points: Mapping[str, tuple[float, float]], crosses: Iterable[tuple[Estimate, Estimate]]
) -> None:
    arms = [arm for x, y in crosses for arm in ((x.low, y.value, x.high, y.value), (x.value, y.low, x.value, y.high))]
    names = [(name, x, y) for name, (x, y) in points.items()]
    label_points(axes, names, np.array(arms), fontsize=_LABEL, leader=QUIET, ground=GROUND)
