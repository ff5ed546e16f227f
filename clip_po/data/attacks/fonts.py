"""Fonts: loaded by name, and those that are installed with the package, of Pillow and matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PILLOW_FONT = "pillow"
"""Name of the default font of Pillow."""


@functools.lru_cache(maxsize=512)
def load_font(name: str, pixels: int) -> Font:
    """Load a font at a size in pixels.

    Args:
        name: "pillow" for the default font of Pillow, or the path of a TrueType or OpenType file.
        pixels: Size of the font's em square, >= 1.

    Returns:
        The font. It is cached, so callers share the object.

    Raises:
        ValueError: If Pillow can't read the file as a font, or `pixels` < 1.
    """
    if name == PILLOW_FONT:
        return ImageFont.load_default(pixels)
    try:
        return ImageFont.truetype(name, pixels)
    except OSError as error:
        raise ValueError(
            f"fonts: {name!r} can't be read as a font ({error}). Give the path of a .ttf or .otf file, "
            f"or {PILLOW_FONT!r} for the default font of Pillow."
        ) from error


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
