"""Fonts that are installed with the package: Pillow's default font and the fonts of matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from clip_po.data.attacks.drawing import PILLOW_FONT


@functools.cache
def _folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_files(names: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of fonts that come with matplotlib.

    Args:
        names: File names without ".ttf", such as "DejaVuSerif-Bold".

    Returns:
        One path per name, in the same order. `load_font` raises if there is no such file.
    """
    return tuple(str(_folder() / f"{name}.ttf") for name in names)


def training_fonts() -> tuple[str, ...]:
    """Return the fonts of training attacks, none of a family of `unseen_fonts`.

    Returns:
        Eight names for `load_font`: Pillow's default font, and DejaVu Sans, STIX and Computer Modern of matplotlib.
    """
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "STIXGeneral", "STIXGeneralBol", "cmss10", "cmr10")
    return (PILLOW_FONT, *font_files(names))


def unseen_fonts() -> tuple[str, ...]:
    """Return the fonts of evaluation attacks, none of them in `training_fonts`.

    Returns:
        Four names for `load_font`: DejaVu Serif and DejaVu Sans Mono of matplotlib, each regular and bold.
    """
    return font_files(("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"))
