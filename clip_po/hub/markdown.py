"""Text from elsewhere, such as names of classes and models, as Markdown that shows it literally."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"[\\`*|]|!?\[(?=[^\]]*\]\()|\b_|_\b(?!\w)|~(?=~)|^[#>+-](?=\s)")
_HTML = re.compile(r"<|&(?=#|\w+;)")


def escape_markdown(text: str) -> str:
    """Escape a text for a Markdown paragraph, heading or table cell.

    Args:
        text: Any text.

    Returns:
        One line that a Markdown renderer shows as the text: no HTML, links, emphasis, code or new cells.
    """
    line = _MARKUP.sub(lambda match: "\\" + match[0], " ".join(text.split()))
    return _HTML.sub(lambda match: {"<": "&lt;", "&": "&amp;"}[match[0]], line)


def code_span(text: str) -> str:
    """Format a text as code.

    Args:
        text: Any text.

    Returns:
        One line: the text between more backticks than it contains in a row.
    """
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
