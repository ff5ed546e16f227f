"""The reliability diagram: how often models are right, by how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clip_po.evaluation.calibration import ReliabilityBin
from clip_po.evaluation.report.figures import DPI, GROUND, MARKERS, QUIET, SERIES, styled

_LARGEST, _SMALLEST = 90.0, 12.0  # areas of the markers, in square points


def reliability_plot(diagrams: Mapping[str, Sequence[ReliabilityBin]]) -> Figure:
    """Plot the probability of each bin (x) against the share of it that came true (y).

    A calibrated model is on the diagonal, an overconfident one below it. The area of a marker grows with the number of
    rows in its bin.

    Args:
        diagrams: Bins by model, at least one bin for each.

    Returns:
        The figure.
    """
    with styled():
        figure = Figure(figsize=(4.0, 3.7), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set(xlabel="probability", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.set_aspect("equal")
        axes.axline((0, 0), (1, 1), color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for number, (name, bins) in enumerate(diagrams.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            x, y = [part.probability for part in bins], [part.frequency for part in bins]
            most = max(part.rows for part in bins)
            areas = [_SMALLEST + (_LARGEST - _SMALLEST) * part.rows / most for part in bins]
            axes.plot(x, y, color=colour, linewidth=1.1, alpha=0.5, zorder=2)
            axes.scatter(x, y, areas, color=colour, marker=marker, edgecolors=GROUND, label=name, zorder=3)
        axes.legend(loc="upper left", borderaxespad=0.2, handletextpad=0.1)
    return figure
