"""Keeping secrets out of whatever is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAMES = ("token", "secret", "password", "api_key", "credential")
_HUB_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]+)*")  # those of OAuth have dots


def redacted(settings: Any) -> Any:
    """Settings without secrets, at any depth.

    Args:
        settings: Mappings, lists, dataclasses and plain values.

    Returns:
        The same in mappings and lists; a text under a name that speaks of a token, secret, password, key of an API or
        credential is replaced, and so is a Hub token in any text.
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
