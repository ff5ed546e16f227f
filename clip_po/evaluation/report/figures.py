"""Figures as files and as parts of a page: one style, the same bytes for the same numbers."""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.figure import Figure

INK, QUIET, RULE, GROUND = "#181c24", "#6a717e", "#dee1e7", "#ffffff"
# Source: Okabe and Ito 2008, Color Universal Design; without the yellow, which is lost on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")
MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {
    INK: "--plot-ink",
    QUIET: "--plot-quiet",
    RULE: "--plot-rule",
    GROUND: "--plot-ground",
    **{colour: f"--plot-{number}" for number, colour in enumerate(SERIES, 1)},
}
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
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
DPI, _PNG_DPI = 100, 220


def styled() -> AbstractContextManager[None]:
    """The style that figures are drawn and saved in."""
    # Begun from matplotlib's own defaults: a user's matplotlibrc must not change what is drawn.
    return style.context(["default", _STYLE])


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
    with styled():
        figure.savefig(target, dpi=_PNG_DPI, facecolor=GROUND, metadata=nameless)
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
    with styled():
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
