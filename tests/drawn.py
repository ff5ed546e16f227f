"""What was drawn on an image, and attacks to draw it."""

import dataclasses

import numpy as np
from PIL import Image

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.drawing import TextStyle

WORDS = ("cat", "dog", "bird", "hot dog")
GREY = (128, 128, 128)


def flat(colour="white", size=(64, 64)):
    return Image.new("RGB", size, colour)


def attack(**arguments):
    return TypographicAttack(**{"words": WORDS, "min_side": 64, **arguments})


def ink(before, after):
    """Where an image changed, bool[H, W]."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def extent(mask):
    """First and last row and column where anything changed."""
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return down[0], down[-1], across[0], across[-1]


def lines(mask):
    """How many runs of inked rows there are."""
    inked = mask.any(1).astype(int)
    return int((np.diff(np.concatenate([[0], inked])) == 1).sum())


PLAIN = TextStyle(
    font="pillow",
    size=0.2,
    place=(0.5, 0.5),
    colours=((0, 0, 0),),
    outline=0.0,
    rotation=0.0,
    opacity=1.0,
    sticker=None,
)


def style(**changes):
    return dataclasses.replace(PLAIN, **changes)
