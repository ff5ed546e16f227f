"""Fonts that are installed with the package: Pillow's own, and those that matplotlib carries."""

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
    """Paths of fonts that matplotlib carries.

    Args:
        names: Their files' names without ".ttf", such as "DejaVuSerif-Bold".
    """
    return tuple(str(_folder() / f"{name}.ttf") for name in names)


def training_fonts() -> tuple[str, ...]:
    """Fonts of attacks in training: every family that `unseen_fonts` does not hold."""
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "STIXGeneral", "STIXGeneralBol", "cmss10", "cmr10")
    return (PILLOW_FONT, *font_files(names))


def unseen_fonts() -> tuple[str, ...]:
    """Fonts of attacks in evaluation, which `training_fonts` does not hold."""
    return font_files(("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"))
