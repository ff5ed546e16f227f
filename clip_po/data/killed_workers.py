"""Processes that load data and are killed: what happened and what to do, instead of torch's bare message."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

_KILLED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) "
    r"(?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly(?: with exit code (?P<status>\d+))?)"
)


@contextlib.contextmanager
def killed_workers_explained(num_workers: int) -> Iterator[None]:
    """Turn torch's error about a killed data loader worker into one that says what to do.

    torch raises it in the main thread wherever that is, not only where a batch is read.

    Args:
        num_workers: Number of worker processes, for the message.

    Yields:
        Nothing.

    Raises:
        ChildProcessError: If a worker was killed or ended itself. Errors that a worker raises are passed on unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        # Where torch raises two errors, the first of them, the cause, knows the signal or the status.
        found = _KILLED.search(f"{error.__cause__ or ''}") or _KILLED.search(str(error))
        if found is None:
            raise
        raise ChildProcessError(_explanation(found, num_workers)) from error


def _explanation(found: re.Match[str], num_workers: int) -> str:
    signal = found["signal"] or ""
    if "Bus error" in signal:
        cause = (
            "its shared memory (/dev/shm) is full. In a container, raise it: docker run --shm-size=8g or --ipc=host"
        )
    elif "Segmentation fault" in signal or found["status"]:
        cause = "a library crashed on some row. To see where, load data in the main process, with 0 workers"
    else:
        cause = "usually the machine ran out of memory. Use smaller batches, or images of fewer pixels"
    ended = f"was killed (signal: {signal.strip()})" if signal else f"ended (status {found['status'] or 'unknown'})"
    return (
        f"A process that loads data (pid {found['pids']}, one of {num_workers} workers) {ended}: {cause}. Fewer "
        "workers need less memory (dataloader_num_workers of the trainer, num_workers of evaluations). A training "
        "continues from its last whole checkpoint with resume_from_checkpoint=True."
    )
