"""Preferences from a stream: its rows checked as they come, with the same weights and images as rows by number."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.typographic import TypographicAttack
from clip_po.data.checking import check_drawn, image_sources
from clip_po.data.class_labels import check_class_names
from clip_po.data.formats import IMAGE_COLUMNS, Row, as_list, check_row, check_types, row_format, to_texts
from clip_po.data.images import to_rgb
from clip_po.data.pairs import PreferencePairs
from clip_po.data.sampler import RowKey
from clip_po.data.skipped_rows import UnreadableImage, blank_image
from clip_po.data.stream_reader import StreamMark, StreamReader, StreamRow
from clip_po.data.typographic import TypographicRows
from clip_po.losses import SINGLE_REJECTED, WITHOUT_REJECTED


class TypographicStream(TypographicRows):
    """A stream of labelled images as preferences, as `TypographicPreferences` makes them of a data set with a length.

    An attack is drawn from (attack.seed, epoch, number of the row in its pass). Labels and weights are checked as
    rows come.

    Args:
        stream: Rows with an image and a class.
        attack: As for `TypographicPreferences`, and so are the others.
        class_names: The classes by label; the names of the ClassLabel feature where it is None.
        template: Prompt of a class, with one `{}`.
        image_column: Name of the image column.
        label_column: Name of the class column, ClassLabel or int.
        rejected: "word" or "others".
        weight_column: Name of a column of weights >= 0; None weighs all alike.

    Raises:
        ValueError: Missing columns, no class names, a template without its one `{}`, or an unknown `rejected`.
        TypeError: No `datasets.IterableDataset`.
    """

    def __init__(
        self,
        stream: IterableDataset,
        attack: TypographicAttack,
        class_names: Sequence[str] | None = None,
        template: str = "a photo of a {}",
        image_column: str = "image",
        label_column: str = "label",
        rejected: Literal["word", "others"] = "word",
        weight_column: str | None = None,
    ) -> None:
        if not isinstance(stream, IterableDataset):
            raise TypeError(
                f"stream must be a datasets.IterableDataset, got {type(stream).__name__}; a datasets.Dataset makes "
                "TypographicPreferences."
            )
        columns = columns_of(stream, "stream")
        for name in filter(None, (image_column, label_column, weight_column)):
            if name not in columns:
                raise ValueError(f"The stream has no column {name!r}; it has {columns}.")
        feature = (stream.features or {}).get(label_column)
        names = class_names if class_names is not None else getattr(feature, "names", None)
        if names is None:
            raise ValueError(f"Column {label_column!r} is {feature}, without names; pass class_names.")
        check_class_names(names)
        if isinstance(feature, ClassLabel) and len(feature.names) != len(names):
            raise ValueError(
                f"Column {label_column!r} has {len(feature.names)} classes, class_names has {len(names)} names; give "
                "one name for each, in its order."
            )
        super().__init__(attack, names, template, rejected)
        self.stream = stream
        self.image_column, self.label_column, self.weight_column = image_column, label_column, weight_column

    def label_and_weight(self, values: Row, where: str) -> tuple[int, float]:
        """The class and the weight of a row, checked.

        Raises:
            ValueError: It can't be used; the message says where and why.
        """
        label = values[self.label_column]
        if (
            isinstance(label, bool)
            or not isinstance(label, (int, np.integer))
            or not 0 <= label < len(self.class_names)
        ):
            raise ValueError(
                f"{where}: {self.label_column!r} is {label!r}, expected a class number in "
                f"0..{len(self.class_names) - 1}. Leave such rows out by stream.filter, or mend class_names."
            )
        weight = 1.0 if self.weight_column is None else values[self.weight_column]
        if (
            isinstance(weight, bool)
            or not isinstance(weight, (int, float, np.number))
            or not 0 <= weight < float("inf")
        ):
            raise ValueError(
                f"{where}: {self.weight_column!r} is {weight!r}, expected a finite number >= 0. Mend it, or leave "
                "such rows out by stream.filter."
            )
        return int(label), float(weight)


class StreamedPairs(PreferencePairs):
    """Preferences of a stream, each with its regularization image; to be read forward, in whole batches.

    A key's position says which row is meant: the rows of all passes in their order, each pass filled up to whole
    global batches. Whoever asks for another's rows in between (a process, a worker) makes them pass undecoded.

    Args:
        preferences: A `datasets.IterableDataset` in a preference format, or a `TypographicStream`.
        batches: Global batches of the run.
        multiple: Rows of a global batch.
        loss_types: Names of the losses.
        **arguments: As for `PreferencePairs`.
    """

    def __init__(
        self,
        preferences: IterableDataset | TypographicStream,
        batches: int,
        multiple: int,
        loss_types: Sequence[str],
        **arguments: Any,
    ) -> None:
        super().__init__(preferences, **arguments)
        self.batches = batches
        self.multiple = multiple
        self.loss_types = loss_types
        self._drawn = preferences if isinstance(preferences, TypographicStream) else None
        self._stream = preferences.stream if isinstance(preferences, TypographicStream) else preferences
        clean = {"clean_image"} if self._needed_by["clean_image"] else set()
        self._images = [name for name in IMAGE_COLUMNS if name in {"image"} | clean]
        self._mark: StreamMark | None = None
        self._reader: tuple[int, StreamReader] | None = None

    def __len__(self) -> int:
        return self.batches * self.multiple

    @property
    def fixed_images(self) -> tuple[str, ...]:
        """None: what comes by is not seen twice."""
        return ()

    def start_from(self, mark: StreamMark | None) -> None:
        """Go on after the batch that a mark was taken of, or read from the start."""
        self._mark, self._reader = mark, None

    def __getitem__(self, key: int | RowKey) -> Row:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | RowKey]) -> list[Row]:
        """A batch: rows at positions that follow each other; the last carries the `stream_mark` of the batch."""
        reader = self._reader_at(keys[0][1] if isinstance(keys[0], tuple) else keys[0])
        rows = [self._row(reader.take()) for _ in keys]
        rows[-1]["stream_mark"] = reader.mark()
        return rows

    def _reader_at(self, position: int) -> StreamReader:
        # A reader that a worker process got from its parent shares open files with it.
        reader = self._reader[1] if self._reader is not None and self._reader[0] == os.getpid() else None
        if reader is None or reader.position > position:
            if self._mark is not None and self._mark.position < position:
                reader = StreamReader.resumed(self._stream, self.multiple, self.name, self._mark)
            else:
                reader = StreamReader(self._stream, self.multiple, self.name)
            self._reader = (os.getpid(), reader)
        while reader.position < position:
            reader.take()
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # an iterator, which can't be sent to a worker process

    def _row(self, row: StreamRow) -> Row:
        where = f"{self.name} row {row.number} of the stream"
        reasons: dict[str, str] = {}
        if self._drawn is None:
            texts = self._checked_texts(row.values, where)
            images = {name: self._opened(row.values, name, where, reasons) for name in self._images}
        else:
            drawn, column = self._drawn, self._drawn.image_column
            label, weight = drawn.label_and_weight(row.values, where)
            texts = {**drawn.preference(label, row.number, row.epoch), "weight": weight}
            clean = self._opened(row.values, column, where, reasons)
            attacked = clean if reasons else drawn.attacked(clean, label, row.number, row.epoch)
            images = {"image": attacked, "clean_image": clean}
            reasons = {name: reason for name in images for reason in reasons.values()}
        return self._complete({**texts, **images}, reasons, row.number, row.turn, row.padding)

    def _checked_texts(self, values: Row, where: str) -> Row:
        """What a row holds besides images, checked."""
        texts = {name: value for name, value in values.items() if name not in IMAGE_COLUMNS}
        check_row(texts, self.candidate_texts, where)
        rejected = as_list(texts.get("rejected" if "chosen" in texts else "rejected_label"))
        if not rejected and not set(self.loss_types) <= WITHOUT_REJECTED:
            raise ValueError(
                f"{where}: it has no rejected text, but loss_type={sorted(self.loss_types)} needs one in every row. "
                "Leave such rows out by stream.filter."
            )
        single = SINGLE_REJECTED & set(self.loss_types)
        if single and len(rejected) > 1:
            raise ValueError(
                f"{where}: it has {len(rejected)} rejected texts, but {sorted(single)} compare the chosen text with "
                "one. Keep one a row by stream.map, or use 'sigmoid' (S-DPO)."
            )
        return to_texts(texts, self.candidate_texts)

    def _opened(self, values: Row, column: str, where: str, reasons: dict[str, str]) -> Image.Image:
        """An image of a row in RGB; blank where it can't be read, with the reason by its column."""
        feature = (self._stream.features or {}).get(column)
        feature = feature if isinstance(feature, ImageFeature) else ImageFeature()
        try:
            if values[column] is None:
                raise ValueError("there is none")
            found = values[column]
            if not isinstance(found, Image.Image):  # datasets 4.7 to 5.0: a map of the stream decodes every image
                found = dataclasses.replace(feature, decode=True).decode_example(found)
            return to_rgb(found)
        except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
            reason = (
                f"{where}: the image in column {column!r} can't be read ({type(error).__name__}: {error}). Mend the "
                "file, or leave the row out by stream.filter."
            )
            if self.on_bad_image == "raise":
                raise UnreadableImage(reason) from error
            reasons[column] = reason
            return blank_image()


def is_stream(dataset: Any) -> TypeGuard[IterableDataset | TypographicStream]:
    """Whether `checked_stream` takes a data set."""
    return isinstance(dataset, (IterableDataset, TypographicStream))


def columns_of(stream: IterableDataset, name: str) -> list[str]:
    """The columns of a stream; those of its first row where it does not say.

    Raises:
        ValueError: It is empty.
    """
    columns = stream.column_names
    if columns is None:
        first = next(iter(stream.take(1)), None)
        if first is None:
            raise ValueError(f"{name} is empty; give it at least one row.")
        columns = list(first)
    return columns


def checked_stream(
    preferences: IterableDataset | TypographicStream,
    regularization: Dataset | None,
    candidate_texts: Sequence[str] | None,
    args: ContrastivePOConfig,
    name: str,
) -> StreamedPairs:
    """Preference pairs of a stream whose columns were checked; its rows are when they come.

    Args:
        preferences: As for `StreamedPairs`.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        candidate_texts: As for the trainer.
        args: Says which columns the losses need, how many batches there are, and the seed.
        name: What messages call the preferences.

    Raises:
        ValueError, TypeError: What was found, and what to do.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"{name} is streamed and has no length, so max_steps must say after how many optimizer steps training "
            f"ends, got {args.max_steps}. A pass over N rows takes about N / (batch size of all processes and "
            "accumulation steps)."
        )
    for argument in ("precompute_ref_log_probs", "embeddings_cache", "dataloader_drop_last"):
        if getattr(args, argument):
            raise ValueError(
                f"{argument}={getattr(args, argument)!r}, but {name} is streamed: its rows come by once, in whole "
                "batches. Leave it out, or load the data without streaming=True."
            )
    stream = preferences.stream if isinstance(preferences, TypographicStream) else preferences
    if getattr(stream, "_distributed", None) is not None:
        raise ValueError(
            f"{name} was split by split_dataset_by_node, but the trainer deals its rows to the processes itself. Give "
            "every process the whole stream."
        )
    if isinstance(preferences, TypographicStream):
        check_drawn(preferences, candidate_texts, args, name)
        columns = list(preferences.column_names)
    else:
        columns = columns_of(preferences, name)
        if row_format(columns, name) == "class-preference" and candidate_texts is None:
            raise ValueError(
                f"{name} has the columns label and rejected_label, which are positions in `candidate_texts`, but no "
                "candidate_texts were given. Pass the class prompts, such as [f'a photo of a {c}' for c in classes]."
            )
        check_types(preferences, name)
        rejected = "rejected" if "chosen" in columns else "rejected_label"
        if rejected not in columns and not set(args.loss_type) <= WITHOUT_REJECTED:
            raise ValueError(
                f"{name} has no column {rejected!r} (its columns: {columns}), which loss_type={args.loss_type} needs; "
                "only 'sft' and 'distillation' do without."
            )
    source, targets = image_sources(columns, regularization, args, name)
    multiple = args.train_batch_size * args.world_size
    return StreamedPairs(
        preferences,
        batches=args.max_steps * args.gradient_accumulation_steps,
        multiple=multiple,
        loss_types=args.loss_type,
        regularization=source,
        candidate_texts=candidate_texts,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        name=name,
        targets=targets,
        on_bad_image=args.on_bad_image,
    )
