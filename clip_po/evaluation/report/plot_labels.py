"""Placement of point labels in a plot, so that labels do not overlap each other, points or lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

_DIRECTIONS = np.linspace(0, 2 * np.pi, 16, endpoint=False)
_RADII = (8, 16, 28, 44, 62, 84, 110)  # Distances from a point to its label, in pixels.
_MARKER = 6  # Half the side of a marker, in pixels.
_LEADER_FROM = 14  # Distance in pixels from which a label gets a line to its point.


def label_points(
    axes: Axes,
    labels: Sequence[tuple[str, float, float]],
    arms: np.ndarray,
    *,
    fontsize: float,
    leader: str,
    ground: str,
) -> None:
    """Label points without overlaps. A label far from its point gets a line to it.

    Set limits and position of the axes before, because positions are computed in pixels.

    Args:
        axes: Axes with the points.
        labels: Name, x and y of each point, in data units.
        arms: Array [K, 4] of vertical or horizontal lines to avoid, as x, y, x, y in data units. Rows with NaN are
            left out.
        fontsize: Font size, in points.
        leader: Colour of the lines from labels to points.
        ground: Background colour of the labels.
    """
    if not labels:
        return
    texts = [
        axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=fontsize,
            parse_math=False,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": ground, "edgecolor": "none", "alpha": 0.75},
            arrowprops={"arrowstyle": "-", "color": leader, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            zorder=6,
        )
        for name, x, y in labels
    ]
    # Text.get_window_extent leaves out the line, which the extent of an annotation includes.
    sizes = np.array([(box.width, box.height) for box in map(Text.get_window_extent, texts)])
    anchors = axes.transData.transform(np.array([(x, y) for _, x, y in labels]))
    lines = axes.transData.transform(arms[np.isfinite(arms).all(axis=1)].reshape(-1, 2)).reshape(-1, 4)
    centers = _place(anchors, sizes + 4, lines, np.array(axes.get_window_extent().extents))
    for text, center, anchor, size in zip(texts, centers, anchors, sizes, strict=True):
        x, y = (center - anchor) * 72 / axes.figure.dpi
        text.set_position((x, y))
        gap = np.maximum(np.abs(center - anchor) - size / 2, 0)
        if np.hypot(*gap) < _LEADER_FROM and text.arrow_patch is not None:
            text.arrow_patch.set_visible(False)


def _place(anchors: np.ndarray, sizes: np.ndarray, arms: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return the centers [N, 2] of labels near their points, in pixels.

    Each label in turn moves to the place of lowest cost among fixed places around its point, given the places of the
    other labels, until no label moves. Nothing is random, so a figure is the same every time.

    Args:
        anchors: Array [N, 2] of points, in pixels.
        sizes: Array [N, 2], width and height of each label, in pixels.
        arms: Array [K, 4] of vertical or horizontal lines, as x, y, x, y in pixels.
        frame: Array [4], left, bottom, right and top of the area for the labels, in pixels.
    """
    ring = np.array([(radius, angle) for radius in _RADII for angle in _DIRECTIONS])
    steps = np.stack([np.cos(ring[:, 1]), np.sin(ring[:, 1])], axis=1)
    markers = np.concatenate([anchors - _MARKER, anchors + _MARKER], axis=1)
    low, high = np.minimum(arms[:, :2], arms[:, 2:]) - 1, np.maximum(arms[:, :2], arms[:, 2:]) + 1
    lines = np.concatenate([low, high], axis=1)
    places, fixed = [], []
    for anchor, size in zip(anchors, sizes, strict=True):
        centers = anchor + steps * (ring[:, :1] + size / 2)
        boxes = np.concatenate([centers - size / 2, centers + size / 2], axis=1)
        outside = np.maximum(frame[:2] - boxes[:, :2], 0) + np.maximum(boxes[:, 2:] - frame[2:], 0)
        hidden = 30 * (_overlaps(boxes, markers) > 0).sum(axis=1) + 0.015 * _overlaps(boxes, lines).sum(axis=1)
        fixed.append(hidden + 10 * outside.sum(axis=1) + 0.15 * ring[:, 0])
        places.append(boxes)
    taken = np.array([costs.argmin() for costs in fixed])
    for _ in range(8):
        before = taken.copy()
        for label, boxes in enumerate(places):
            others = np.array([places[other][taken[other]] for other in range(len(places)) if other != label])
            strokes = np.array(
                [
                    (*anchors[other], *(places[other][taken[other]].reshape(2, 2).mean(axis=0)))
                    for other in range(len(places))
                    if other != label
                ]
            )
            costs = fixed[label]
            if len(others):
                crossed = _crossings(anchors[label], (boxes[:, :2] + boxes[:, 2:]) / 2, strokes)
                costs = costs + 0.5 * _overlaps(boxes, others).sum(axis=1) + 8 * crossed
            taken[label] = costs.argmin()
        if (taken == before).all():
            break
    chosen = np.array([boxes[place] for boxes, place in zip(places, taken, strict=True)])
    return (chosen[:, :2] + chosen[:, 2:]) / 2


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas [N, M] that boxes [N, 4] share with others [M, 4], each as left, bottom, right, top."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.maximum(high - low, 0).prod(axis=2)


def _crossings(start: np.ndarray, ends: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """Return how many strokes [M, 4] each line from start [2] to one of the ends [N, 2] crosses, [N]."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.sign((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0])

    a, b, c, d = start, ends[:, None], strokes[None, :, :2], strokes[None, :, 2:]
    return ((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)).sum(axis=1)
