"""Named lists of neutral queries: words, and the prompts for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from clip_po.bounded_text import parse_yaml
from clip_po.validation import check_template


@dataclass(frozen=True)
class Queries:
    """A list of search queries.

    Attributes:
        name: Name of the list.
        words: Q different words or phrases.
        templates: Prompts with one `{}` each for the word.

    Raises:
        TypeError: If a template is not a string.
        ValueError: If there are no words, words are repeated, or a template does not contain exactly one `{}`.
    """

    name: str
    words: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise if the list is not valid."""
        if not self.words or len(set(self.words)) < len(self.words):
            raise ValueError(f"The queries {self.name!r} must be different texts, at least one, got {self.words}.")
        for position, template in enumerate(self.templates):
            check_template(template, f"templates[{position}] of the queries {self.name!r}")


def query_lists() -> list[str]:
    """Return the names of the lists in the package.

    Returns:
        Names for `load_queries`, sorted.
    """
    return sorted(Path(file.name).stem for file in files("clip_po").joinpath("assets", "queries").iterdir())


def load_queries(name: str, templates: Sequence[str] | None = None) -> Queries:
    """Load a list of queries of the package, or one of your own.

    Args:
        name: One of `query_lists()`; a YAML file with `queries` and `templates`; or a text file with one query per
            line, which is used unchanged.
        templates: Prompts that replace the prompts of the list; None to keep them.

    Returns:
        The queries.

    Raises:
        ValueError: If there is no such list, or it is not valid.
    """
    if name in query_lists():
        text, suffix = files("clip_po").joinpath("assets", "queries", f"{name}.yaml").read_text("utf-8"), ".yaml"
    elif Path(name).is_file():
        text, suffix = Path(name).read_text(encoding="utf-8"), Path(name).suffix
    else:
        raise ValueError(
            f"There are no queries {name!r}: it is not a file, and the lists of the package are {query_lists()}. Give "
            "one of them, or a file."
        )
    if suffix not in (".yaml", ".yml"):
        words = tuple(line.strip() for line in text.splitlines() if line.strip())
        return Queries(Path(name).stem, words, tuple(templates or ("{}",)))
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid YAML ({error}). Fix it.") from error
    if not isinstance(found, dict) or set(found) != {"queries", "templates"}:
        raise ValueError(f"{name} must have the keys queries and templates, each a list of texts. See docs/bias.md.")
    words = tuple(str(word) for word in found["queries"] or ())
    return Queries(Path(name).stem, words, tuple(templates or found["templates"]))
