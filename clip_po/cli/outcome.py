"""Outcomes of a command beside success, an error and an interruption."""

UNCHANGED = 3
"""Exit status of a command that ran, but saved the model that it started from."""


class NothingChanged(Exception):
    """The command ran as asked and saved the model that it started from. The message says why and what to do."""
