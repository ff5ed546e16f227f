"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to a temporary file that replaces `path` once it is complete.

    The temporary file is in the same folder, so that the replacement is a single rename. Its content reaches the disk
    before the rename: after a crash `path` holds either its old or its new content. If the block raises, `path` keeps
    its old content and the temporary file is removed.

    Args:
        path: The file to write. Missing parent folders are created.

    Yields:
        The path of the temporary file, to be written by the block.

    Raises:
        OSError: If the folder is not writable or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
