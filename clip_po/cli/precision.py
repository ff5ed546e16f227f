"""Default precision and attention of a training: the fast ones on the machine at hand."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clip_po.cli.flags import flag_value, is_given

PRECISION_FLAGS = ("bf16", "fp16")
"""Flags that choose the precision. If one is given, so is the precision."""

BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of a processor, as Linux names them, that compute in bfloat16."""


def precision_defaults(argv: Sequence[str]) -> Mapping[str, Any]:
    """Return defaults of flags for the precision in which this machine trains fastest without loss of accuracy.

    bfloat16 is used where the accelerator or the processor computes in it natively, float32 elsewhere. On a processor,
    attention is then computed without fused kernels, whose backward pass is slower in bfloat16
    (`benchmarks/precision.py`). Weights are float32 in any case.

    Args:
        argv: Command line after the command.

    Returns:
        Values by name of the flag; empty if the command line, its YAML file or accelerate chooses a precision.
    """
    if any(is_given(name, argv) for name in PRECISION_FLAGS) or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return {}
    use_cpu = str(flag_value("use_cpu", argv)).lower() not in ("none", "false")
    if torch.accelerator.is_available() and not use_cpu:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return {"bf16": True} if native else {}
    if not BFLOAT16_FEATURES & processor_features():
        return {}
    return {"bf16": True, "use_cpu": True, "attn_implementation": "eager"}


def processor_features() -> frozenset[str]:
    """Return the features of the processor, as Linux names them.

    Returns:
        Names such as "avx512_bf16"; none where the system does not list them.
    """
    file = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not file.exists():
        return frozenset()
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return frozenset(next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), ()))
