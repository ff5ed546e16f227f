"""Calls of the Hub: repeated while it is busy, and explained if they fail."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from transformers.utils import logging

from clip_po.hub.redaction import redacted

logger = logging.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 6
"""Number of tries. The waits between them double from 1 to 16 seconds, unless the Hub asks for another wait."""

LONGEST_WAIT = 300.0
"""If the Hub asks for a longer wait, in seconds, the call fails."""

_BUSY = frozenset({408, 412, 429, *range(500, 600)})  # 412: another commit came first
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""`HTTPError` of the httpx version that huggingface_hub uses. It is the base of connection errors too."""

_REMEDIES: Mapping[int, str] = {
    401: "The Hub does not accept the token, or there is none (401). Log in with `hf auth login`, or set HF_TOKEN or "
    "hub_token to a valid token with write access.",
    403: "The token may not do this (403). Use a token with write access to this repository, or choose a hub_model_id "
    "in your own namespace.",
    404: "There is no such repository or revision, or the token can't see it (404). Check hub_model_id, hub_revision "
    "and the token.",
}


class HubError(OSError):
    """A call of the Hub failed. The message says which, why, and what to do."""


def call_hub(what: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that calls the Hub. Repeat it while the Hub is busy or not reachable.

    Args:
        what: What the call does, for messages, such as "Pushing to 'me/clip'".
        call: The function. It must be safe to repeat.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Its result.

    Raises:
        HubError: If the Hub refuses the call (401, 403, 404 and others), or is still busy (412, 429, 5xx) or not
            reachable after `TRIES` tries.
    """
    for tries in range(1, TRIES + 1):
        try:
            return call(*args, **kwargs)
        except RemoteEntryNotFoundError:  # an answer, not a failure
            raise
        except (_HTTPError, LocalEntryNotFoundError) as raised:
            # A download that finds nothing in the cache hides the error of the Hub behind one of its own.
            error = raised if isinstance(raised, _HTTPError) else raised.__cause__
            if not isinstance(error, _HTTPError):  # offline mode
                raise
            wait = _wait(error, tries)
            if wait is None or tries == TRIES:
                raise HubError(f"{what} failed. {_explanation(error, wait, tries)}") from error
            logger.warning(f"{what} failed ({_reason(error)}). Trying again in {wait:.0f} seconds.")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def find_file(name: str | os.PathLike[str], file: str, written_by: str, **hub: Any) -> Path:
    """Find a file in a folder, or download it from the Hub.

    Args:
        name: Folder or Hub id.
        file: Name of the file.
        written_by: What writes such files, for the message.
        **hub: As in `huggingface_hub.hf_hub_download`.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it does not contain the file.
        HubError: As in `call_hub`.
    """
    found = Path(name, file)
    if not os.path.isdir(name):
        try:
            return Path(call_hub(f"Loading {str(name)!r}", hf_hub_download, str(name), file, **hub))
        except RemoteEntryNotFoundError:
            pass
        except LocalEntryNotFoundError as error:  # offline mode
            raise FileNotFoundError(
                f"{str(name)!r} is not a folder, and {file} of a Hub repository of that name is not in the cache, "
                f"while HF_HUB_OFFLINE is set. Check the name. {written_by}"
            ) from error
        except HFValidationError as error:
            raise FileNotFoundError(f"{str(name)!r} is neither a folder nor a Hub id. Check the name.") from error
    if not found.is_file():
        raise FileNotFoundError(f"{str(name)!r} does not contain {file}. {written_by}")
    return found


def _wait(error: Exception, tries: int) -> float | None:
    """Return the seconds to wait before the next try; None if another try is useless."""
    if not isinstance(error, HfHubHTTPError):  # no answer at all
        return 2.0 ** (tries - 1)
    if error.response.status_code not in _BUSY:
        return None
    asked = _asked_wait(error.response.headers)
    if asked is None:
        return 2.0 ** (tries - 1)
    return asked if asked <= LONGEST_WAIT else None


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the Hub asks to wait, from Retry-After (seconds or a date) or the Hub's RateLimit."""
    if (until := headers.get("Retry-After")) is not None:
        if until.strip().isdigit():
            return float(until)
        try:
            return max(0.0, (parsedate_to_datetime(until) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _explanation(error: Exception, wait: float | None, tries: int) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"The Hub is not reachable ({_reason(error)}, {tries} tries). Check the network, then try again."
    status = error.response.status_code
    if status in _BUSY:
        asked = _asked_wait(error.response.headers) if wait is None else None
        until = "later" if asked is None else f"in {asked:.0f} seconds, as the Hub asks"
        return f"The Hub is busy ({_reason(error)}; tries: {tries}). Try again {until}."
    return f"{_REMEDIES.get(status, f'The Hub refuses ({status}).')} It says: {_reason(error)}"


def _reason(error: Any) -> str:
    lines = [line for line in str(redacted(str(error))).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(line.strip() for line in (lines[0], *lines[-1:]) if line) if len(lines) > 1 else lines[0]
