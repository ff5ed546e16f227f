"""report.json: one schema for the results of every command."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_po.atomic_write import atomic_write
from clip_po.bounded_text import parse_json
from clip_po.evaluation.bootstrap import Estimate
from clip_po.hub.redaction import publishable, redacted

SCHEMA_VERSION = 1

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "pillow")


def write_report(
    path: str | os.PathLike[str],
    *,
    command: str,
    models: Mapping[str, Mapping[str, Estimate]],
    settings: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    retention: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> Path:
    """Write report.json: the results, and everything needed to reproduce them.

    The file is written whole or not at all. Undefined numbers become null. Secrets are replaced, and absolute paths
    are reduced to their last part, as in `clip_po.hub.redaction.publishable`.

    Args:
        path: The file. Missing folders are created.
        command: Name of the command that measured, such as "evaluate".
        models: Estimates by model and metric.
        settings: Arguments of the command, of any types; values that JSON does not support become text.
        data: Names, sizes and fingerprints of the data.
        retention: The section on other tasks, as from `retention_section`; None for none.
        seconds: Duration of the command.

    Returns:
        The path.

    Raises:
        TypeError: If a metric is not an `Estimate`.
        OSError: If the file is not writable.
    """
    for model, metrics in models.items():
        for metric, estimate in metrics.items():
            if not isinstance(estimate, Estimate):
                raise TypeError(
                    f"{metric} of {model} is {estimate!r}, expected an Estimate. Wrap a bare number as "
                    "Estimate(value)."
                )
    report = {
        "schema_version": SCHEMA_VERSION,
        "clip_po_version": _version("clip_po"),
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {
            model: {metric: estimate.as_dict() for metric, estimate in metrics.items()}
            for model, metrics in models.items()
        },
        "data": publishable(data or {}),
        **({} if retention is None else {"retention": publishable(retention)}),
        "settings": publishable(settings),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": _hardware(),
        "seconds": seconds,
    }
    return write_json(path, report)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a JSON file whole or not at all. Undefined numbers become null, unknown objects become text.

    Args:
        path: The file. Missing folders are created.
        value: The content.

    Returns:
        The path.

    Raises:
        OSError: If the file is not writable.
    """
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(_plain(value), file, indent=2, allow_nan=False, ensure_ascii=False)
        file.write("\n")
    return Path(path)


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a report.json and check its version.

    Args:
        path: The file.

    Returns:
        The report as in the file; `report_estimates` converts its numbers to estimates.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a report of clip_po, or its version is not supported.
    """
    try:
        report = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Give a report.json written by clip-po.") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version is None:
        raise ValueError(f"{path} has no schema_version. Give a report.json written by clip-po.")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version!r} (written by clip_po {report.get('clip_po_version')}), "
            f"but this clip_po reads {SCHEMA_VERSION}. Install the version that wrote it, or run the command again."
        )
    return report


def report_estimates(report: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Return the estimates of a report by model and metric; null becomes nan.

    Args:
        report: From `read_report`.

    Returns:
        Estimates by model and metric, in the order of the report.
    """
    return {
        model: {metric: read_estimate(numbers) for metric, numbers in metrics.items()}
        for model, metrics in report["models"].items()
    }


def read_estimate(numbers: Mapping[str, float | None]) -> Estimate:
    """Return an estimate of a report.

    Args:
        numbers: value, low and high by name; null for an undefined number.

    Returns:
        The estimate; null becomes nan.
    """
    return Estimate(**{name: math.nan if part is None else part for name, part in numbers.items()})


def _plain(value: Any) -> Any:
    """Return the value in JSON types: nan and infinities as null, unknown objects as text."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return _plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner) for inner in value), key=str)
    return str(redacted(str(value)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }
