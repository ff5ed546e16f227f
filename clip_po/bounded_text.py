"""JSON and YAML of unknown origin: what would exhaust the stack or the memory is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml

MAX_NODES = 200_000
"""Largest number of values in a YAML text, with every alias written out."""


def parse_json(text: str) -> Any:
    """Parse JSON.

    Args:
        text: The text.

    Returns:
        The value.

    Raises:
        ValueError: If it is not JSON, or its values are nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML. Aliases are allowed, but not as many as could fill the memory.

    Args:
        text: The text.

    Returns:
        The value; None for an empty text.

    Raises:
        ValueError: If it is not YAML, its values are nested too deeply, an alias refers to what contains it, or the
            values are more than `MAX_NODES` with every alias written out.
    """
    try:
        nodes = _nodes(yaml.compose(text, yaml.SafeLoader), {})
        if nodes > MAX_NODES:
            raise ValueError(f"its aliases stand for {nodes:.1e} values, more than {MAX_NODES:,}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def _nodes(node: Any, counted: dict[Hashable, int]) -> int:
    """Return the number of nodes below a node, aliases written out. `counted` holds 0 for a node being counted."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = 0
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_nodes(part, counted) for part in parts)
    elif not counted[id(node)]:
        raise ValueError("an alias refers to a value that contains it")
    return counted[id(node)]
