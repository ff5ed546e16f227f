"""Which numbers an argument may be, and whether a folder can be written to: asked before any work is done."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """The numbers that an argument may be.

    Attributes:
        words: What messages say that it must.
        holds: Whether a finite number is one of them.
        kind: Real, or Integral for whole numbers.
    """

    words: str
    holds: Callable[[Any], bool]
    kind: type = Real


FINITE = Allowed("be a finite number", lambda number: True)
POSITIVE = Allowed("be a finite number > 0", lambda number: number > 0)
NOT_NEGATIVE = Allowed("be a finite number >= 0", lambda number: number >= 0)
BELOW_ONE = Allowed("be a number in [0, 1)", lambda number: 0 <= number < 1)
COUNT = Allowed("be a whole number >= 1", lambda number: number >= 1, Integral)
COUNT_OR_NONE = Allowed("be a whole number >= 0", lambda number: number >= 0, Integral)
STEPS = Allowed(
    "be a whole number >= 1, or -1 to count in epochs", lambda number: number == -1 or number >= 1, Integral
)
SEED = Allowed("be a whole number from 0 to 2**32 - 1", lambda number: 0 <= number < 2**32, Integral)


def check_number(name: str, value: Any, allowed: Allowed, remedy: str = "") -> None:
    """Refuse a value that is none of the numbers that an argument may be.

    Args:
        name: What messages call the argument.
        value: What was given.
        allowed: The numbers it may be.
        remedy: A sentence that says what to do, where the numbers alone do not.

    Raises:
        TypeError: It is no number, or not a whole one where that is asked for.
        ValueError: It is another number, infinite or nan.
    """
    after = f" {remedy}" if remedy else ""
    if isinstance(value, bool) or not isinstance(value, allowed.kind):
        raise TypeError(f"{name} must {allowed.words}, got {value!r} ({type(value).__name__}).{after}")
    if not math.isfinite(value) or not allowed.holds(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must {allowed.words}, got {value!r}.{after}")


def check_writable(folder: str | os.PathLike[str], name: str = "output_dir") -> None:
    """Refuse a folder that nothing can be written to, before hours of work end there.

    Args:
        folder: Made where it is missing.
        name: What messages call it.

    Raises:
        OSError: It can't be made or written to; the message says why and what to do.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            f"{name} {str(folder)!r} can't be written to ({error}). Give another folder, or mend its owner, its "
            "permissions or the disk that it lies on: nothing was computed yet."
        ) from error
