"""Parsing of flags and recipes, with errors of one line that name what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from trl import TrlParser

from clip_po.cli.arguments import read_mapping

ENSEMBLE = "--prompt_template"
"""The flag that may be given several times. Of other repeated flags, the last one counts, as usual."""


class FlagParser(TrlParser):
    """A `TrlParser` without abbreviations, whose errors are exceptions instead of pages of usage.

    Args:
        dataclass_types: Dataclasses whose fields are the flags.
        command: The command, for messages.
    """

    def __init__(self, dataclass_types: Sequence[type], command: str) -> None:
        # An abbreviation may be another flag: --weight would set weight_decay.
        super().__init__(dataclass_types, prog=f"clip-po {command}", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError with the message of argparse."""
        raise ValueError(f"{message}. {self.prog} --help-all lists all flags.")

    @property
    def names(self) -> list[str]:
        """Names of the flags, without dashes."""
        return [f.name for cls in self.dataclass_types for f in dataclasses.fields(cls) if f.init]

    def check_flags(self, argv: Sequence[str]) -> None:
        """Raise if a word of a command line is neither a flag nor the value of one.

        Args:
            argv: The words, without --config.

        Raises:
            ValueError: If there are such words. The message names the first one, and similar flags.
        """
        _, rest = self.parse_known_args(list(argv))
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            flag = unknown[0].split("=")[0]
            raise ValueError(f"unknown flag {flag}.{self._did_you_mean(flag, '--')}")
        if rest:
            raise ValueError(
                f"{rest[0]!r} is not the value of a flag. Put its flag before it, as in --dataset_name {rest[0]}."
            )

    def check_recipe(self, names: Iterable[str], file: str) -> None:
        """Raise if a name in a recipe is not that of a flag.

        Args:
            names: The names.
            file: The recipe, for the message.

        Raises:
            ValueError: If there is such a name. The message has flags similar to the first.
        """
        known = {*self.names, "env"}  # TrlParser sets environment variables from it
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{file!r} has unknown keys {unknown}.{self._did_you_mean(unknown[0], '')}")

    def _did_you_mean(self, name: str, dashes: str) -> str:
        found = [f"{dashes}{flag}" for flag in similar_names(name, self.names)]
        meant = f" Did you mean {' or '.join(found)}?" if found else ""
        return f"{meant} {self.prog} --help-all lists all flags."


def similar_names(name: str, known: Sequence[str], most: int = 3) -> list[str]:
    """Return the names of flags that an unknown name may stand for, the best first.

    Args:
        name: The unknown name, with or without dashes.
        known: The names of all flags.
        most: Number of names to return at most.

    Returns:
        Names with these initials (`lr` for `learning_rate`), of similar spelling, or with all of its words.
    """
    plain = name.strip("-").replace("-", "_").lower()
    words = set(plain.split("_"))
    initials = [flag for flag in known if "".join(part[0] for part in flag.split("_") if part) == plain]
    spelled = difflib.get_close_matches(plain, known, n=most, cutoff=0.7)
    holding = sorted((f for f in known if words <= set(f.split("_"))), key=lambda f: not f.startswith(plain))
    return list(dict.fromkeys([*initials, *spelled, *holding]))[:most]


def flag_value(name: str, argv: Sequence[str]) -> str | None:
    """Return the value of a flag that is needed before the others are parsed, from flags or YAML file.

    Args:
        name: Name of the flag, without dashes.
        argv: Command line after the command.

    Returns:
        The value; None if there is none.

    Raises:
        ValueError, OSError: As in `read_mapping`, for the YAML file.
    """
    for position, word in enumerate(argv):
        if word == f"--{name}":
            return argv[position + 1] if position + 1 < len(argv) else None
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    if name != "config" and (file := flag_value("config", argv)) is not None:
        return read_mapping(file).get(name)
    return None


def is_given(name: str, argv: Sequence[str]) -> bool:
    """Return whether a flag is on a command line or in its YAML file, with any value.

    Args:
        name: Name of the flag, without dashes.
        argv: Command line after the command.

    Returns:
        True if it is.

    Raises:
        ValueError, OSError: As in `read_mapping`, for the YAML file.
    """
    if any(word.split("=")[0] == f"--{name}" for word in argv):
        return True
    file = flag_value("config", argv)
    return file is not None and name in read_mapping(file)


def parse_flags(parser: FlagParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parse flags and `--config` into one object for each class of the parser.

    Args:
        parser: The parser.
        argv: Command line after the command.

    Returns:
        The objects, in the order of the classes.

    Raises:
        ValueError: If a flag or a key of the recipe is unknown, or a value is not valid; also as in `read_mapping`.
        OSError: If the recipe can't be read.
    """
    file, flags = flag_value("config", argv), joined(without_config(argv), ENSEMBLE)
    parser.check_flags(flags)
    if file is None:
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    parser.check_recipe(read_mapping(file), file)
    return parser.parse_args_and_config(["--config", file, *flags])


def without_config(argv: Sequence[str]) -> list[str]:
    """Return a command line without --config and its value."""
    words = list(argv)
    for position, word in enumerate(words):
        if word.split("=")[0] == "--config":
            del words[position : position + (1 if "=" in word else 2)]
            break
    return words


def joined(argv: Sequence[str], flag: str) -> list[str]:
    """Return a command line in which a flag with several values occurs once, with the values of all its occurrences.

    Args:
        argv: The words.
        flag: The flag, with its dashes.

    Returns:
        The words, with the flag at the end.
    """
    others: list[str] = []
    values: list[str] = []
    target = others
    for word in argv:
        if word.split("=")[0].replace("-", "_").lstrip("_") == flag.lstrip("-"):
            target = values
            values += word.split("=", 1)[1:]
        else:
            target = others if word.startswith("--") else target
            target.append(word)
    return [*others, flag, *values] if values else list(argv)


def resumed_checkpoint(given: Any) -> str | bool | None:
    """Return --resume_from_checkpoint as the trainer takes it.

    Args:
        given: The value of the flag or of the recipe.

    Returns:
        The folder of a checkpoint, True for the last one in the output folder, or None for a new run.
    """
    return {"true": True, "false": None, "none": None}.get(str(given).lower(), given)
