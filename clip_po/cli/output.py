"""What commands print, and to whom: a pipe may close early, and progress bars are for terminals."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Pipe:
    """A stream that drops what is written once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._until_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still buffered would raise again, also when Python exits.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_progress_bars() -> None:
    """Hide the progress bars of clip_po, datasets, transformers and huggingface_hub: in a file they are noise."""
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    logging.disable_progress_bar()


@contextlib.contextmanager
def piped_output() -> Iterator[None]:
    """Let a command finish although the reader of its output leaves early, as in `clip-po evaluate | head`."""
    pipe = cast(TextIO, _Pipe(sys.stdout))
    with contextlib.redirect_stdout(pipe):
        try:
            yield
        finally:
            pipe.flush()
