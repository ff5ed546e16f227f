"""clip-po COMMAND. Imports nothing heavy until it knows what to do, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.resources import files

from clip_po.hub.redaction import redacted

COMMANDS = {
    "train": "Align a CLIP on labelled images, on which words are written.",
    "evaluate": "Measure what words on images do to a checkpoint, before and after alignment.",
    "compare": "Run several methods and seeds on one model and data set, in one table.",
    "steer": "Turn what the written word says up, off or around by one number, without training the model.",
    "demo": "Align the embedded model by several methods and show what each gains and costs.",
}


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def usage() -> str:
    """What `clip-po --help` prints."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: clip-po COMMAND [--flag value ...] [--config file.yaml]",
            "",
            "Align contrastive vision-language models by preference optimization.",
            "",
            *lines,
            "",
            "clip-po COMMAND --help lists a command's flags; clip-po --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 2 for arguments that can't be used or a run that had to stop, or 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"clip-po {metadata.version('clip_po')}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"clip-po: no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        print(files("clip_po").joinpath("assets", "help", f"{command}.txt").read_text(), end="")
        return 0
    module = import_module(f"clip_po.cli.{command}")
    try:
        module.main(rest)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        # What the package refuses says what to do: a traceback would hide it.
        print(redacted(f"clip-po {command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        go_on = {"train": " The last whole checkpoint stays: go on from it with --resume_from_checkpoint true."}
        print(f"clip-po {command}: interrupted.{go_on.get(command, '')}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
