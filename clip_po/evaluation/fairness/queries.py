"""Neutral queries by name: words and the prompts they stand in, apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Queries:
    """What images are searched for.

    Attributes:
        name: Name of the list.
        words: Q different words or phrases.
        templates: Prompts with one `{}` each for the word.
    """

    name: str
    words: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what is no list of queries."""
        if not self.words or len(set(self.words)) < len(self.words):
            raise ValueError(f"The queries {self.name!r} must be different texts, at least one, got {self.words}.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"Template {template!r} of the queries {self.name!r} must have exactly one {{}}.")


def query_lists() -> list[str]:
    """Names of the lists that come with the package."""
    return sorted(Path(file.name).stem for file in files("clip_po").joinpath("assets", "queries").iterdir())


def load_queries(name: str, templates: Sequence[str] | None = None) -> Queries:
    """A list of the package, or one of your own.

    Args:
        name: One of `query_lists()`; a YAML file with `queries` and `templates`; or a text file, one query a line,
            taken as it is.
        templates: Prompts in the place of the list's; None for those.

    Raises:
        ValueError: There is no such list, or it is not as it must be.
    """
    if name in query_lists():
        text, suffix = files("clip_po").joinpath("assets", "queries", f"{name}.yaml").read_text("utf-8"), ".yaml"
    elif Path(name).is_file():
        text, suffix = Path(name).read_text(encoding="utf-8"), Path(name).suffix
    else:
        raise ValueError(f"There are no queries {name!r}: it is no file, and the package has {query_lists()}.")
    if suffix not in (".yaml", ".yml"):
        words = tuple(line.strip() for line in text.splitlines() if line.strip())
        return Queries(Path(name).stem, words, tuple(templates or ("{}",)))
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML ({error}).") from error
    if not isinstance(found, dict) or set(found) != {"queries", "templates"}:
        raise ValueError(f"{name} must have the keys queries and templates, each a list of texts; see docs/bias.md.")
    words = tuple(str(word) for word in found["queries"] or ())
    return Queries(Path(name).stem, words, tuple(templates or found["templates"]))
