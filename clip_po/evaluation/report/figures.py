"""The style of all figures, and saving them as PNG, as SVG, or as an SVG element of a page."""

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
# Source: Okabe and Ito 2008, Color Universal Design. The yellow is left out because it is hard to see on white.
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
    # Keep text as text, so that it can be searched, read aloud, and set in the font of the page.
    "svg.fonttype": "none",
    "svg.hashsalt": "clip_po",
}
DPI, _PNG_DPI = 100, 220


def styled() -> AbstractContextManager[None]:
    """Return a context in which figures are drawn and saved in the style of this package.

    Returns:
        The context manager.
    """
    # Start from matplotlib's defaults, so that a user's matplotlibrc does not change the figure.
    return style.context(["default", _STYLE])


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Save a figure as PNG or SVG. The same figure gives the same bytes.

    Args:
        figure: From a function of `plots`.
        path: The file, ending in .png or .svg. Missing folders are created.

    Returns:
        The path.

    Raises:
        ValueError: If the file has another ending.
    """
    target = Path(path)
    ending = target.suffix.lower()
    if ending not in (".png", ".svg"):
        raise ValueError(f"{target} ends in {ending!r}. Name the file .png or .svg.")
    target.parent.mkdir(parents=True, exist_ok=True)
    no_metadata: dict[str, Any] = {"Software": None} if ending == ".png" else {"Date": None, "Creator": None}
    with styled():
        figure.savefig(target, dpi=_PNG_DPI, facecolor=GROUND, metadata=no_metadata)
    return target


def figure_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element to embed in a page, without external references or clashing ids.

    The background is transparent. Colours are CSS variables (--plot-ink, --plot-quiet, --plot-rule, --plot-ground,
    --plot-1 to --plot-7) that default to the colours of the figure, so that a page can have a dark mode.

    Args:
        figure: From a function of `plots`.

    Returns:
        The element. The same figure gives the same text.
    """
    file = io.StringIO()
    with styled():
        no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    drawn = file.getvalue()
    own = hashlib.sha256(drawn.encode()).hexdigest()[:10]
    referenced = set(re.findall(r'(?:href="|url\()#([\w-]+)', drawn))
    root = ElementTree.fromstring(drawn)
    for parent in root.iter():
        # A <style> element would apply to the whole page. The style of the root replaces it below.
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
    """Return an attribute's value with the prefix `own` on ids and with colours as CSS variables."""
    if name == "id":
        return f"{own}-{value}"
    if name == "href":
        return value.replace("#", f"#{own}-")
    if name == "style":
        return re.sub("#[0-9a-f]{6}", lambda found: _variable(found[0]), value)
    return value.replace("url(#", f"url(#{own}-") if name == "clip-path" else value


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]}, {colour})" if colour in _VARIABLES else colour
