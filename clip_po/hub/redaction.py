"""Redaction of secrets in settings and messages before they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAMES = ("token", "secret", "password", "api_key", "credential")
_HUB_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]+)*")  # OAuth tokens contain dots.


def redacted(settings: Any) -> Any:
    """Return settings without secrets, at any depth.

    Args:
        settings: Mappings, lists, tuples, dataclasses and plain values. They are not changed.

    Returns:
        The settings as dicts, lists and plain values. A value is replaced by `REDACTED` if its name contains "token",
        "secret", "password", "api_key" or "credential", unless it is a number, a boolean or None. A Hub token is
        replaced in any string.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, Mapping):
        return {key: _without_secret(str(key), value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [redacted(value) for value in settings]
    return _HUB_TOKEN.sub(REDACTED, settings) if isinstance(settings, str) else settings


def _without_secret(name: str, value: Any) -> Any:
    secret = any(word in name.casefold() for word in _SECRET_NAMES)
    harmless = value is None or isinstance(value, (bool, int, float))
    return REDACTED if secret and not harmless else redacted(value)
