"""Flags that were given although another flag makes them meaningless: refused before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from trl import ModelConfig

REPLACED_BY_NAMES = ("name_until", "class_name_map")
"""Flags that change the class names of the dataset."""

SET_BY_THE_COMMAND = ("lora_task_type", "lora_target_modules", "lora_dropout")
"""LoRA flags whose default the command changes."""


def check_task_flags(args: Any) -> None:
    """Raise if a flag about class names or attack words has no effect.

    Args:
        args: `TaskArguments` of a command.

    Raises:
        ValueError: If one has none; the message names both flags.
    """
    if args.attack_other_words is not None and not args.other_share:
        raise ValueError(
            "--attack_other_words has no effect without --attack_other_share above 0. Set it, or leave "
            "--attack_other_words out."
        )
    for name in REPLACED_BY_NAMES:
        if getattr(args, name) is not None and args.class_names is not None:
            raise ValueError(f"--{name} has no effect next to --class_names, which names every class. Leave one out.")


def check_lora_flags(args: ModelConfig) -> None:
    """Raise if flags about adapters were given without --use_peft.

    Args:
        args: The model flags of `clip-po train`.

    Raises:
        ValueError: If they were; the message names them.
    """
    defaults = ModelConfig()
    given = [
        field.name
        for field in fields(args)
        if field.name.startswith(("lora_", "use_rslora", "use_dora")) and field.name not in SET_BY_THE_COMMAND
        if getattr(args, field.name) != getattr(defaults, field.name)
    ]
    if given and not args.use_peft:
        flags = " and ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags} would have no effect: without --use_peft the whole tower trains. Add --use_peft.")
