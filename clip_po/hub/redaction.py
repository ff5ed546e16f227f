"""Redaction of secrets, and of this machine's folders, before settings and messages are written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import PureWindowsPath
from typing import Any

REDACTED = "<redacted>"

_SECRET_NAMES = re.compile(r"token|secret|passw|passphrase|credential|authorization|(api|access|private)_?key")
_PUBLIC_NAMES = re.compile(r"tokeni[sz]|tokens_(seen|per)|(bos|eos|pad|unk|cls|sep|mask|image|special)_tokens?")
"""What looks like a secret in a name and is none: counts of tokens, tokenizers and their special tokens."""

_HUB_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]+)*")  # OAuth tokens contain dots.
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)")

_ROOT = r"(?:/(?![mg]/)|~/|[A-Za-z]:[\\/]|\\\\)"  # /m/01yrx names a class of Open Images
_WHOLE_PATH = re.compile(rf"(?:file://)?{_ROOT}[^\n:'\"]*")
_PATH_IN_TEXT = re.compile(
    rf"(?<=['\"]){_ROOT}[^'\"\n]*(?=['\"])"  # quoted, as in error messages, with any spaces
    r"|file://[^\s'\"<>|,;)]+"
    r"|(?<![\w.:/\\~-])(?!/[mg]/)(?:~?(?:/[^\s/'\"<>|,;:()]+){2,}|(?:[A-Za-z]:[\\/]|\\\\)[^\s'\"<>|,;:()]+)"
)


def redacted(settings: Any) -> Any:
    """Return settings without secrets, at any depth.

    Args:
        settings: Mappings, lists, tuples, dataclasses and plain values. They are not changed.

    Returns:
        The settings as dicts, lists and plain values. A value is replaced by `REDACTED` if its name is that of a
        secret, such as "hub_token" or "api_key", unless it is a number, a boolean or None. Names such as
        "eos_token" and "include_num_input_tokens_seen" are not secrets. A Hub token and the login in a URL are
        replaced in any string.
    """
    return _rewritten(settings, _without_tokens)


def publishable(settings: Any) -> Any:
    """Return settings without secrets and without the folders of this machine, for files that are published.

    Args:
        settings: As for `redacted`.

    Returns:
        As from `redacted`. Of an absolute path, alone or inside a text, only the last part is left,
        "photos" for "/home/me/photos". Relative paths, Hub ids and URLs do not change.
    """
    return _rewritten(settings, lambda text: without_folders(_without_tokens(text)))


def without_folders(text: str) -> str:
    """Return a text in which absolute paths are reduced to their last part.

    Args:
        text: A path, or a text that contains paths.

    Returns:
        The text, with "photos" for "/home/me/photos".
    """
    return _last_part(text) if _WHOLE_PATH.fullmatch(text) else _PATH_IN_TEXT.sub(lambda m: _last_part(m[0]), text)


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or path  # Windows paths may contain both kinds of slashes.


def _without_tokens(text: str) -> str:
    return _LOGIN_IN_URL.sub(REDACTED, _HUB_TOKEN.sub(REDACTED, text))


def _rewritten(settings: Any, rewrite: Callable[[str], str]) -> Any:
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, Mapping):
        return {
            rewrite(key) if isinstance(key, str) else key: REDACTED
            if _is_secret(str(key), value)
            else _rewritten(value, rewrite)
            for key, value in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return [_rewritten(value, rewrite) for value in settings]
    if isinstance(settings, os.PathLike):
        settings = os.fspath(settings)
    return rewrite(settings) if isinstance(settings, str) else settings


def _is_secret(name: str, value: Any) -> bool:
    harmless = value is None or isinstance(value, (bool, int, float))
    return not harmless and _SECRET_NAMES.search(_PUBLIC_NAMES.sub("", name.casefold())) is not None
