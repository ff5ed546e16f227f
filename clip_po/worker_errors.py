"""Errors of worker processes: the message that was raised, without the traceback around it."""

from __future__ import annotations

import re


def raised_message(error_type: type[BaseException], message: str) -> str:
    """Return the message of an error as it was raised, in this process or in a worker of a `DataLoader`.

    A `DataLoader` raises the error of a worker again with the worker's traceback, which ends in the message, for a
    message.

    Args:
        error_type: The class of the error.
        message: Its message.

    Returns:
        The message alone.
    """
    if not message.startswith(f"Caught {error_type.__name__} in DataLoader worker"):
        return message
    *_, last = re.finditer(rf"(?m)^(\w+\.)*{error_type.__name__}: ", message)
    return message[last.end() :].strip()
