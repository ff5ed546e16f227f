"""The random state of a training, which evaluations and caches leave as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Run a block that only observes. Afterwards, every global random generator is where it was before.

    Args:
        device: Device of the training. The generators of Python, NumPy, the CPU and this device are restored.

    Yields:
        Nothing.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device]  # the generator of mps has no number
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
