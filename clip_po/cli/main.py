"""The entry point of clip-po. Heavy packages are imported only when a command runs, so that --help is fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.resources import files

from clip_po.cli.outcome import UNCHANGED, NothingChanged
from clip_po.cli.output import hide_progress_bars, piped_output
from clip_po.hub.redaction import redacted
from clip_po.worker_errors import raised_message

COMMANDS = {
    "train": "Align a model on labelled images with words written on them, or on feedback.",
    "evaluate": "Measure a checkpoint before and after alignment: words on images, preferences, retrieval.",
    "score": "Rank texts for images, or images for texts, with any checkpoint.",
    "compare": "Run several methods and seeds on one model and dataset, and compare them in one table.",
    "steer": "Turn the concept of written words up, off or around by one number, without training the model.",
    "convert": "Convert an open_clip checkpoint for transformers, or a checkpoint back for open_clip.",
    "demo": "Align the embedded model by several methods and show the gains and costs of each.",
}
"""Description of each command, by name."""

HELP = ("-h", "--help")
HELP_ALL = "--help-all"

USAGE_ERROR = 2
"""Exit status of a command that cannot run or had to stop."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


def usage() -> str:
    """Return the text of `clip-po --help`.

    Returns:
        The text, without a newline at the end.
    """
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: clip-po COMMAND [--flag value ...] [--config file.yaml]",
            "",
            "Align contrastive vision-language models by preference optimization.",
            "",
            *lines,
            "",
            "clip-po COMMAND --help lists the flags of a command, and --help-all those that are rarely needed too.",
            "clip-po --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run clip-po.

    Args:
        argv: Command line without the name of the program; None for the command line of the process.

    Returns:
        The exit status: 0, `USAGE_ERROR`, `UNCHANGED` or `INTERRUPTED`.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with piped_output():
        return dispatch(command, rest)


def dispatch(command: str, rest: Sequence[str]) -> int:
    """Run a command, or print its help or the version.

    Args:
        command: The first word of the command line.
        rest: The words after it.

    Returns:
        The exit status, as from `main`.
    """
    if command in HELP:
        print(usage())
    elif command == "--version":
        print(f"clip-po {metadata.version('clip_po')}")
    elif command not in COMMANDS:
        return fail(f"clip-po: unknown command {command!r}. Choose one of {', '.join(COMMANDS)}.")
    elif HELP_ALL in rest or any(flag in rest for flag in HELP):
        print(help_page(command, all_flags=HELP_ALL in rest), end="")
    else:
        return run(command, rest)
    return 0


def help_page(command: str, *, all_flags: bool) -> str:
    """Return the help page of a command.

    Args:
        command: One of `COMMANDS`.
        all_flags: Whether to return the page of all flags, where there is a shorter one too.

    Returns:
        The page, as `clip_po.cli.help` has written it.
    """
    pages = files("clip_po").joinpath("assets", "help")
    short = pages.joinpath(f"{command}-short.txt")
    return (pages.joinpath(f"{command}.txt") if all_flags or not short.is_file() else short).read_text()


def run(command: str, argv: Sequence[str]) -> int:
    """Run a command, with errors as one line of text instead of a traceback.

    Args:
        command: One of `COMMANDS`.
        argv: Command line after the command.

    Returns:
        The exit status: 0, `USAGE_ERROR`, `UNCHANGED` or `INTERRUPTED`.
    """
    module = import_module(f"clip_po.cli.{command}")
    if not sys.stderr.isatty():
        hide_progress_bars()
    try:
        module.main(argv)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        # The message says what to do, and a traceback would hide it.
        return fail(f"clip-po {command}: {raised_message(type(error), str(error))}")
    except NothingChanged as outcome:
        return fail(f"clip-po {command}: {outcome}", UNCHANGED)
    except KeyboardInterrupt:
        remedies = {"train": " The last whole checkpoint is kept. Resume from it with --resume_from_checkpoint true."}
        return fail(f"clip-po {command}: interrupted.{remedies.get(command, '')}", INTERRUPTED)
    return 0


def fail(message: str, status: int = USAGE_ERROR) -> int:
    """Print an error without secrets, and return the exit status.

    Args:
        message: The error, with a remedy.
        status: The exit status.

    Returns:
        The exit status.
    """
    print(redacted(message), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
