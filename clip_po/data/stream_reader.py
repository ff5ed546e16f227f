"""Rows of a stream: read forward, pass after pass, and again from where a run was interrupted."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from PIL import Image

from clip_po.bounded_text import parse_json
from clip_po.data.formats import Row

STREAM_FILE = "stream.json"
"""In a checkpoint: the `StreamMark` of the last batch before it."""

MATCHING_ROWS = 64
"""Number of consecutive rows that must match before a resumed stream is considered identical. A shorter match could be
coincidence."""


@dataclass(frozen=True)
class StreamMark:
    """A position in a stream before the first row of a global batch, and a digest of the rows since to verify it by.

    Attributes:
        position: Number of rows handed out before it, padding included.
        turn: Number of rows read before it in all passes.
        epoch: Number of passes before this one.
        number: Number of rows read before it in this pass.
        digest: Digest of these rows of this pass.
        start: `position` and `turn` at which this pass began.
        state: `state_dict` of the dataset; None at the start of a pass.
        following: Number of rows read since: at least `MATCHING_ROWS`, fewer near the start of a pass.
        digest_after: Digest of the rows of this pass up to and including the rows since.
        agreed: A digest that is the same in every process, because all read the same rows.
    """

    position: int = 0
    turn: int = 0
    epoch: int = 0
    number: int = 0
    digest: int = 0
    start: tuple[int, int] = (0, 0)
    state: Any = None
    following: int = 0
    digest_after: int = 0
    agreed: int = 0

    def of_pass(self) -> StreamMark:
        """Return the mark of the start of this pass.

        Returns:
            A mark without a state of the dataset, and with no rows to verify.
        """
        return StreamMark(*self.start, epoch=self.epoch, start=self.start)

    def save(self, folder: str | Path) -> None:
        """Write the mark to a checkpoint folder, without its `state` if JSON can't hold it.

        Args:
            folder: An existing folder. `STREAM_FILE` in it is overwritten.

        Raises:
            OSError: If the file can't be written.
        """
        values = dataclasses.asdict(self)
        try:
            text = json.dumps(values)
        except TypeError:  # the state of a user's own dataset: its pass is read again on resume
            text = json.dumps({**values, "state": None})
        Path(folder, STREAM_FILE).write_text(text)

    @classmethod
    def load(cls, folder: str | Path) -> StreamMark | None:
        """Read the mark of a checkpoint folder.

        Args:
            folder: Folder that `save` wrote to.

        Returns:
            The mark; None if the folder has no `STREAM_FILE`.

        Raises:
            ValueError: If the file does not hold JSON.
        """
        file = Path(folder, STREAM_FILE)
        if not file.is_file():
            return None
        values = parse_json(file.read_text())
        return cls(**{**values, "start": tuple(values["start"])})


@dataclass(frozen=True)
class StreamRow:
    """A row of a stream.

    Attributes:
        values: Its columns; images are not decoded.
        epoch: Number of passes before this one.
        number: Its position in the pass.
        turn: Number of rows before it in all passes.
        padding: Whether it repeats the last row of the pass to fill up a global batch.
    """

    values: Row
    epoch: int
    number: int
    turn: int
    padding: bool


class StreamReader:
    """A reader of a stream, forward, pass after pass, each filled up to whole global batches.

    Images are not decoded, so skipping rows costs no more than reading their bytes.

    Args:
        stream: The rows; its shuffling, if any, differs from pass to pass (`set_epoch`).
        multiple: Number of rows of a global batch.
        name: Name of the stream in messages.
        mark: Where to start; the beginning by default.
    """

    def __init__(self, stream: IterableDataset, multiple: int, name: str, mark: StreamMark | None = None) -> None:
        # A copy: otherwise set_epoch would act on all worker processes, which may be in different passes.
        self._stream = undecoded(stream)
        self._multiple = multiple
        self._name = name
        self._mark = self._next_mark = mark or StreamMark()
        self._agreed = 0
        self.position = self._mark.position
        self._number, self._digest = self._mark.number, self._mark.digest
        self._rows = self._read()

    @classmethod
    def resumed(cls, stream: IterableDataset, multiple: int, name: str, mark: StreamMark) -> StreamReader:
        """Return a reader that has just read the rows after a mark, verified to be the same rows as before.

        It starts from the state of the dataset. If that gives other rows, it reads the pass from its beginning: a
        shuffle buffer is not part of the state.

        Args:
            stream: The rows, from their first.
            multiple: Number of rows of a global batch, as in the interrupted run.
            name: Name of the stream in messages.
            mark: The mark of the interrupted run.

        Returns:
            The reader. Its next row is the one after the rows that the mark says to verify.

        Raises:
            ValueError: If neither gives the same rows, or the stream is empty or fails.
        """
        wanted = (mark.epoch, mark.number + mark.following, mark.digest_after)
        for start in (mark, mark.of_pass()) if mark.state is not None else (mark.of_pass(),):
            reader = cls(stream, multiple, name, start)
            try:
                while reader._read_so_far[:2] < wanted[:2]:
                    reader.take()
            except ValueError:
                if start.state is None:
                    raise
                continue  # the state belongs to a stream of another kind
            if reader._read_so_far == wanted:
                return reader
        rows = f"{mark.number}..{mark.number + mark.following - 1}"
        raise ValueError(
            f"{name} can't be resumed exactly: rows {rows} of its pass {mark.epoch} differ from the rows that the "
            "interrupted run saw. Give its shuffling a seed, stream.shuffle(seed=0), and have a generator yield the "
            "same rows each time; or continue with other rows, from the start of the stream, by ignore_data_skip=True."
        )

    @property
    def _read_so_far(self) -> tuple[int, int, int]:
        return self._mark.epoch, self._number, self._digest

    def take(self) -> StreamRow:
        """Return the next row.

        Returns:
            The next row of the pass, or padding at its end. The next pass follows, without end.

        Raises:
            ValueError: If the stream is empty or fails.
        """
        row = next(self._rows)
        self.position += 1
        return row

    def mark(self) -> StreamMark:
        """Return a mark from which the rows after the last one can be read again.

        Returns:
            The mark, for `resumed`. It is before the last row and says how many rows to read again and verify.
        """
        following = self._number - self._mark.number
        return dataclasses.replace(self._mark, following=following, digest_after=self._digest, agreed=self._agreed)

    def _read(self) -> Iterator[StreamRow]:
        start_mark = self._mark
        position, turn, start, last, last_pass = start_mark.position, start_mark.turn, start_mark.start, {}, 0
        for epoch in range(start_mark.epoch, 2**63):
            rows = self._pass(epoch, start_mark.state if epoch == start_mark.epoch else None)
            while True:
                if position % self._multiple == 0:
                    self._agreed = self._digest if self._number else last_pass
                    self._move_mark(StreamMark(position, turn, epoch, self._number, self._digest, start))
                values = next(rows, None)
                if values is None:
                    break
                self._digest = digest(values, self._digest)
                self._number += 1
                yield StreamRow(values, epoch, self._number - 1, turn, padding=False)
                position, turn, last = position + 1, turn + 1, values
            if not self._number:
                raise ValueError(f"{self._name} is empty; give it at least one row.")
            while position % self._multiple:
                yield StreamRow(last, epoch, self._number - 1, turn, padding=True)
                position += 1
            start, last_pass, self._number, self._digest = (position, turn), self._digest, 0, 0

    def _move_mark(self, here: StreamMark) -> None:
        if not here.number:
            self._mark = self._next_mark = here
        elif here.number - self._next_mark.number >= MATCHING_ROWS:
            self._mark = self._next_mark
            self._next_mark = dataclasses.replace(here, state=self._stream.state_dict())

    def _pass(self, epoch: int, state: Any) -> Iterator[Row]:
        self._stream.set_epoch(epoch)
        self._stream.load_state_dict(state)
        # Not iter(stream), which in a worker process would give that worker's part of the files alone.
        batches = iter(self._stream.iter(batch_size=1))
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # from the network, from files, or from functions of the user
                raise ValueError(
                    f"{self._name} row {self._number} of the stream (pass {epoch}): the stream itself failed "
                    f"({type(error).__name__}: {error}), and no row after it can be read. on_bad_image='skip' "
                    "skips images that the trainer decodes. If a map of yours fails on one, have it return the image "
                    "undecoded, with stream.cast_column('image', datasets.Image(decode=False)) before it."
                ) from error
            if batch is None:
                return
            yield {column: values[0] for column, values in batch.items()}


def columns_of(stream: IterableDataset, name: str) -> list[str]:
    """Return the columns of a stream, from its first row if it does not declare them.

    Args:
        stream: The rows.
        name: Name of the stream in messages.

    Returns:
        Names of the columns in the order of the stream.

    Raises:
        ValueError: If the stream declares no columns and is empty.
    """
    if stream.column_names is not None:
        return stream.column_names
    first = next(iter(stream.take(1)), None)
    if first is None:
        raise ValueError(f"{name} is empty; give it at least one row.")
    return list(first)


def undecoded(stream: IterableDataset) -> IterableDataset:
    """Return a copy of a stream whose images stay bytes or paths, so that a broken one does not end it.

    Args:
        stream: The rows. If it declares no features, its values stay as they are.

    Returns:
        The copy, without the stream's format.
    """
    plain = stream.with_format(None)
    return plain.decode(False) if plain.features else plain


def digest(value: Any, before: int = 0) -> int:
    """Return a checksum of a row as it was read, continued from the checksum of the rows before it.

    Args:
        value: A row, or a value in it. The order of the columns does not matter.
        before: Checksum of the rows before it; 0 for the first.

    Returns:
        CRC-32, 0..2**32-1.
    """
    if isinstance(value, Mapping):
        for name in sorted(value):
            before = digest(value[name], zlib.crc32(name.encode(), before))
        return before
    if isinstance(value, Image.Image):
        return zlib.crc32(value.tobytes(), before)
    return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), before)
