"""Plots of what alignment gains and costs: the same bytes for the same numbers, legible without colour."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.labels import label_points
from clip_po.evaluation.report import format_number

_INK, _QUIET, _RULE, _GROUND = "#181c24", "#6a717e", "#dee1e7", "#ffffff"
# Source: Okabe and Ito 2008, Color Universal Design; without the yellow, which is lost on white.
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {
    _INK: "--plot-ink",
    _QUIET: "--plot-quiet",
    _RULE: "--plot-rule",
    _GROUND: "--plot-ground",
    **{colour: f"--plot-{number}" for number, colour in enumerate(_SERIES, 1)},
}
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    # Text stays text: to be searched, read aloud, and set in the page's own font.
    "svg.fonttype": "none",
    "svg.hashsalt": "clip_po",
}
_DPI, _PNG_DPI = 100, 220
_WIDTH, _HEIGHT = 4.8, 3.7  # inches; no wider than a phone, which would shrink the letters
_LABEL = 9  # points
_TICKS = (1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 1200, 1800, 3600, 7200, 18_000, 36_000, 86_400)  # seconds


def trade_off_plot(
    points: Mapping[str, tuple[Estimate, Estimate]],
    *,
    base: str | None = None,
    allowed_cost: float = 1.0,
    groups: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """Clean accuracy (across) against typographic accuracy (up), with their intervals as crosses.

    Where the base lies so far below the others that they would fall on one another, it is drawn as an arrowhead
    on the lower edge, with its number.

    Args:
        points: Clean and typographic accuracy, 0..1, by name; about twenty names keep apart.
        base: Name of the model before alignment; a line marks its clean accuracy less `allowed_cost`.
        allowed_cost: Percentage points of clean accuracy that an alignment may cost.
        groups: Method and group of a name, such as ("DPO", "LoRA"): a method has one colour and a line through
            its points, a group has one marker. None for a colour a name.

    Returns:
        The figure.

    Raises:
        ValueError: No points, an undefined value, or a `base` or a name of `groups` that is no point.
    """
    _check({f"clean accuracy of {name}": clean for name, (clean, _) in points.items()})
    _check({f"typographic accuracy of {name}": attacked for name, (_, attacked) in points.items()})
    for name in [*([] if base is None else [base]), *(groups or {})]:
        if name not in points:
            raise ValueError(f"{name!r} is none of the points {list(points)}.")
    others = {name: pair for name, pair in points.items() if name != base}
    low, high = _limits(attacked for _, attacked in others.values()) if others else (0.0, 1.0)
    below = base is not None and len(others) > 2 and points[base][1].value < low - (high - low)
    groups = groups or {}
    looks = _looks({name: groups.get(name, (name, "")) for name in others})

    with _styled():
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
            axes.axvspan(axes.get_xlim()[0] - 1, guide, color=_RULE, alpha=0.45, linewidth=0, zorder=0)
            axes.axvline(guide, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            _above(axes, guide, f"{base} \N{MINUS SIGN} {allowed_cost:g} point{'' if allowed_cost == 1 else 's'}")
            if below:
                labels[f"{base}: {format_number(attacked.value)}, below"] = (clean.value, low)
                axes.plot(clean.value, low, "v", color=_INK, markersize=8, clip_on=False, zorder=4)
            else:
                labels[base] = (clean.value, attacked.value)
                _cross(axes, clean, attacked, _INK, "X")
        _legend(axes, {group: looks[name][1] for name, (_, group) in groups.items() if name in looks})
        _label(axes, labels, points.values())
    return figure


def cost_plot(seconds: Mapping[str, float], recovery: Mapping[str, Estimate]) -> Figure:
    """What each method costs in time (across, logarithmic) against the recovery that it brings (up).

    Args:
        seconds: Duration of an alignment by name, > 0.
        recovery: Recovery by the same names; others are left out.

    Returns:
        The figure.

    Raises:
        ValueError: No seconds, none above 0 for a name, or no recovery or an undefined one.
    """
    for name, duration in seconds.items():
        if not (math.isfinite(duration) and duration > 0):
            raise ValueError(f"seconds of {name!r} are {duration!r}, expected more than 0; leave out what has none.")
        if name not in recovery:
            raise ValueError(f"{name!r} has seconds and no recovery; there are those of {list(recovery)}.")
    found = {name: recovery[name] for name in seconds}
    _check({f"recovery of {name}": estimate for name, estimate in found.items()})
    looks = _looks({name: (name, "") for name in found})
    with _styled():
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
        _label(axes, {name: (seconds[name], e.value) for name, e in found.items()}, crosses.values())
    return figure


def sweep_plot(
    positions: Sequence[float],
    curves: Mapping[str, Sequence[Estimate]],
    *,
    xlabel: str,
    ylabel: str = "accuracy",
    chosen: float | None = None,
) -> Figure:
    """Curves with their intervals as bands, over what was swept: an interpolation's alpha, a concept's scale t.

    Args:
        positions: What was swept, ascending or not.
        curves: One estimate a position, by name; undefined ones leave a gap.
        xlabel: What was swept.
        ylabel: What was measured.
        chosen: The position that was chosen, marked with its numbers.

    Returns:
        The figure.

    Raises:
        ValueError: No positions or curves, a curve of another length, or a `chosen` that is no position.
    """
    if not positions or not curves:
        raise ValueError(f"Nothing to draw: {len(positions)} positions and {len(curves)} curves.")
    for name, curve in curves.items():
        if len(curve) != len(positions):
            raise ValueError(f"The curve {name!r} has {len(curve)} estimates for {len(positions)} positions.")
    if chosen is not None and chosen not in positions:
        raise ValueError(f"chosen={chosen!r} is none of the positions {list(positions)}.")
    order = np.argsort(positions)
    x = np.asarray(positions, dtype=np.float64)[order]
    with _styled():
        figure, axes = _axes(0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        ends = {}
        for number, (name, curve) in enumerate(curves.items()):
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            value, low, high = np.array([(e.value, e.low, e.high) for e in curve])[order].T
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, value, color=colour, linewidth=1.8, marker=marker, markersize=4.5, markeredgecolor=_GROUND)
            defined = np.flatnonzero(np.isfinite(value))
            if len(defined):
                ends[name] = (float(x[defined[-1]]), float(value[defined[-1]]), colour)
            if chosen is not None:
                at = [curve[place].value for place, position in enumerate(positions) if position == chosen]
                axes.plot([chosen] * len(at), at, "o", color="none", markeredgecolor=colour, markersize=11, zorder=5)
        axes.set_ylim(_limits(estimate for curve in curves.values() for estimate in curve))
        if chosen is not None:
            axes.axvline(chosen, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            numbers = [(name, curve[list(positions).index(chosen)].value) for name, curve in curves.items()]
            told = ", ".join(f"{name} {format_number(value)}" for name, value in numbers)
            _above(axes, chosen, f"chosen {chosen:g}: {told}")
        _label_ends(axes, ends)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a figure as PNG or SVG; the same figure gives the same bytes.

    Args:
        figure: From one of the plots.
        path: The file, named .png or .svg; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: Another ending.
    """
    target = Path(path)
    ending = target.suffix.lower()
    if ending not in (".png", ".svg"):
        raise ValueError(f"{target} ends in {ending!r}; name the file .png or .svg.")
    target.parent.mkdir(parents=True, exist_ok=True)
    nameless: dict[str, Any] = {"Software": None} if ending == ".png" else {"Date": None, "Creator": None}
    with _styled():
        figure.savefig(target, dpi=_PNG_DPI, facecolor=_GROUND, metadata=nameless)
    return target


def figure_svg(figure: Figure) -> str:
    """A figure as an `<svg>` element that stands in a page: no reference outside it, no name that clashes.

    Its ground is transparent and its colours are CSS variables (--plot-ink, --plot-quiet, --plot-rule,
    --plot-ground, --plot-1 to --plot-7) that fall back to those of the figure, so that a page can turn it dark.

    Args:
        figure: From one of the plots.

    Returns:
        The element, the same for the same figure.
    """
    file = io.StringIO()
    with _styled():
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = file.getvalue()
    own = hashlib.sha256(drawn.encode()).hexdigest()[:10]
    referenced = set(re.findall(r'(?:href="|url\()#([\w-]+)', drawn))
    root = ElementTree.fromstring(drawn)
    for parent in root.iter():
        # It would hold for the whole page; the root says the same below.
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if attributes.get("id") not in referenced:
            attributes.pop("id", None)
        element.attrib = {name: _own(name, value, own) for name, value in attributes.items()}
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    return ElementTree.tostring(root, encoding="unicode")


def format_seconds(seconds: float) -> str:
    """A duration in one or two units: .25 s, 41 s, 2 min, 1 min 30 s, 1 h 5 min.

    Args:
        seconds: >= 0.
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


def _styled() -> AbstractContextManager[None]:
    # Begun from matplotlib's own defaults: a user's matplotlibrc must not change what is drawn.
    return style.context(["default", _STYLE])


def _own(name: str, value: str, own: str) -> str:
    """An attribute's value with the names inside the figure made its own, and its colours variable."""
    if name == "id":
        return f"{own}-{value}"
    if name == "href":
        return value.replace("#", f"#{own}-")
    if name == "style":
        return re.sub("#[0-9a-f]{6}", lambda found: _variable(found[0]), value)
    return value.replace("url(#", f"url(#{own}-") if name == "clip-path" else value


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]}, {colour})" if colour in _VARIABLES else colour


def _check(values: Mapping[str, Estimate]) -> None:
    if not values:
        raise ValueError("There are no points to draw.")
    for name, estimate in values.items():
        if not math.isfinite(estimate.value):
            raise ValueError(f"{name} is {estimate.value}; leave out what is undefined.")


def _limits(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """Where an axis begins and ends: room beyond every interval."""
    ends = [end for e in estimates for end in (e.value, e.low, e.high) if math.isfinite(end)] or [0.0, 1.0]
    room = 0.1 * (max(ends) - min(ends)) or 0.05
    return min(ends) - room, max(ends) + room


def _axes(points: int) -> tuple[Figure, Axes]:
    """A figure and its axes, taller for many points."""
    height = _HEIGHT + 0.09 * max(0, points - 8)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    left, bottom, right, top = 0.64 / _WIDTH, 0.52 / height, 0.12 / _WIDTH, 0.28 / height
    axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(_PaperFormatter(useOffset=False))
    return figure, axes


class _PaperFormatter(ScalarFormatter):
    """Ticks printed as `format_number` prints: .95."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos).replace("0.", ".", 1) if abs(x) < 1 else super().__call__(x, pos)


def _looks(names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name, from its method and its group."""
    methods = list(dict.fromkeys(method for method, _ in names.values()))
    groups = list(dict.fromkeys(group for _, group in names.values()))
    return {
        name: (_SERIES[methods.index(method) % len(_SERIES)], _MARKERS[groups.index(group) % len(_MARKERS)])
        for name, (method, group) in names.items()
    }


def _cross(axes: Axes, x: Estimate, y: Estimate, colour: str, marker: str) -> None:
    arms: dict[str, Any] = {"color": colour, "linewidth": 1.1, "alpha": 0.35, "zorder": 2}
    axes.plot([x.low, x.high], [y.value, y.value], **arms)
    axes.plot([x.value, x.value], [y.low, y.high], **arms)
    axes.plot(x.value, y.value, marker, color=colour, markersize=7, markeredgecolor=_GROUND, zorder=3)


def _above(axes: Axes, x: float, text: str) -> None:
    """A note above the axes, over a place of the axis, kept inside the figure."""
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
        color=_QUIET,
        parse_math=False,
    )


def _legend(axes: Axes, markers: Mapping[str, str]) -> None:
    """Which marker is which group."""
    if len(markers) < 2:
        return
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=_QUIET, markeredgecolor=_GROUND, markersize=7, label=group)
        for group, marker in markers.items()
    ]
    axes.legend(handles=handles, loc="lower left", borderaxespad=0.2, handletextpad=0.1)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Names of curves beside their right ends, moved up where two would overlap."""
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
        texts[name].set_position((8, (above - at) * 72 / _DPI))


def _label(
    axes: Axes, points: Mapping[str, tuple[float, float]], crosses: Iterable[tuple[Estimate, Estimate]]
) -> None:
    arms = [arm for x, y in crosses for arm in ((x.low, y.value, x.high, y.value), (x.value, y.low, x.value, y.high))]
    names = [(name, x, y) for name, (x, y) in points.items()]
    label_points(axes, names, np.array(arms), fontsize=_LABEL, leader=_QUIET, ground=_GROUND)
