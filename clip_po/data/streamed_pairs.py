"""Streamed preferences for training: rows are checked as they arrive and completed as numbered ones are."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from clip_po.candidates import CandidateTexts
from clip_po.config import ContrastivePOConfig
from clip_po.data.anchored_candidates import fit_candidates
from clip_po.data.anchored_checks import check_anchored_row, check_losses, check_ties
from clip_po.data.anchored_rows import IMAGES, anchored_row, stored_images
from clip_po.data.bad_images import OnBadImage, read_or_blank
from clip_po.data.class_positions import check_candidate_positions
from clip_po.data.column_names import check_column_names
from clip_po.data.formats import IMAGE_COLUMNS, Row, check_columns, check_row, check_types, to_texts
from clip_po.data.grades import check_grade_columns
from clip_po.data.images import to_rgb
from clip_po.data.row_completion import RowCompletion, image_sources
from clip_po.data.row_kinds import TIE, has_kinds, kind_of, possible_kinds, standard_row
from clip_po.data.row_texts import check_streamed_texts
from clip_po.data.sampler import RowKey
from clip_po.data.stored_images import decode_stored, image_feature
from clip_po.data.stream_reader import StreamMark, StreamReader, StreamRow, columns_of
from clip_po.data.typographic_preferences import TypographicStream
from clip_po.validation import unreadable_image


class StreamedPairs(torch.utils.data.Dataset[Row]):
    """Preferences of a stream, each with its regularization image; to be read forward, in whole batches.

    A key's position says which row is meant: the rows of all passes in order, each pass filled up to whole global
    batches. Rows in between, which belong to other processes or workers, are skipped undecoded.

    Args:
        preferences: A `datasets.IterableDataset` in a preference format, or a `TypographicStream`.
        batches: Number of global batches of the run.
        multiple: Number of rows of a global batch.
        loss_types: Names of the losses.
        regularization: Ordinary images in a column `image`, "clean_image" for that column of each row, or None.
        candidate_texts: The candidate texts of every row, if any.
        seed: Seed of the order of the regularization images.
        name: Name of the preferences in messages.
        targets: "clean_image" where a loss compares with the reference on each row's clean image.
        on_bad_image: As in `ContrastivePOConfig`. Under "skip" a row says in `skipped` why it is skipped, or "".
        anchored: Whether the kind of each row is told by the columns that it fills.
    """

    def __init__(
        self,
        preferences: IterableDataset | TypographicStream,
        batches: int,
        multiple: int,
        loss_types: Sequence[str],
        regularization: Dataset | Literal["clean_image"] | None = None,
        candidate_texts: CandidateTexts | None = None,
        seed: int = 0,
        name: str = "train_dataset",
        targets: Literal["clean_image"] | None = None,
        on_bad_image: OnBadImage = "raise",
        anchored: bool = False,
    ) -> None:
        self.preferences = preferences
        self.anchored = anchored
        self.batches = batches
        self.multiple = multiple
        self.loss_types = loss_types
        self.completion = RowCompletion(regularization, targets, seed, on_bad_image)
        self.candidate_texts = CandidateTexts() if candidate_texts is None else candidate_texts
        self.name = name
        self._stream = _rows(preferences)
        self._mark: StreamMark | None = None
        self._reader: tuple[int, StreamReader] | None = None

    def __len__(self) -> int:
        return self.batches * self.multiple

    def start_from(self, mark: StreamMark | None) -> None:
        """Set where the next rows are read from.

        Args:
            mark: Mark of the last batch of an interrupted run. The rows up to the end of that batch are read again
                and verified when the next batch is loaded. None starts from the beginning of the stream.
        """
        self._mark, self._reader = mark, None

    def __getitem__(self, key: int | RowKey) -> Row:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | RowKey]) -> list[Row]:
        """Return the rows at consecutive positions, a batch; the last row holds the `stream_mark` of the batch."""
        reader = self._reader_at(keys[0][1] if isinstance(keys[0], tuple) else keys[0])
        rows = [self._completed(reader.take()) for _ in keys]
        rows[-1]["stream_mark"] = reader.mark()
        return rows

    def _reader_at(self, position: int) -> StreamReader:
        # A reader that a worker process inherits shares open files with its parent.
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

    def _completed(self, row: StreamRow) -> Row:
        where = f"{self.name} row {row.number} of the stream"
        _check_no_array(row.values, where)
        if isinstance(self.preferences, TypographicStream):
            values, reasons = self._attacked(self.preferences, row, where)
        elif self.anchored:
            values, reasons = self._anchored(row.values, where)
        else:
            values, reasons = self._preference(row.values, where)
        return self.completion.complete(values, reasons, row.turn, row.padding)

    def _preference(self, values: Row, where: str) -> tuple[Row, dict[str, str]]:
        """Return a row in a preference format, and by column why its images can't be read."""
        texts = {name: value for name, value in values.items() if name not in IMAGE_COLUMNS}
        check_row(texts, self.candidate_texts.texts, self.loss_types, where)
        check_streamed_texts(texts, self.candidate_texts, where)
        used = [name for name in IMAGE_COLUMNS if name == "image" or self.completion.needs_clean_image]
        images = {name: self._decoded(values, name, where) for name in used}
        reasons = {name: reason for name, (_, reason) in images.items() if reason}
        row = {**to_texts(texts, self.candidate_texts.texts), **{name: image for name, (image, _) in images.items()}}
        return row, reasons

    def _anchored(self, stored: Row, where: str) -> tuple[Row, dict[str, str]]:
        """Return a row that is anchored at an image or a text, and by column why its images can't be read."""
        values, columns = standard_row(stored), list(stored)
        kind, features = kind_of(values), self._stream.features or {}
        images = stored_images(values, kind)
        texts = {name: value for name, value in values.items() if name not in IMAGES}
        check_ties(int(texts.get("label_smoothing") == TIE), columns, self.loss_types, where)
        cut = check_anchored_row(texts, kind, len(images), self.candidate_texts, self.loss_types, where)
        if cut and self.candidate_texts.tokens is not None:
            self.candidate_texts.tokens.warn_of_cut(cut, where)
        row = anchored_row(texts, kind, [value for _, value in images], self.candidate_texts)
        if self.completion.needs_clean_image:
            images.append(("clean_image", values.get("clean_image")))
        decoded: list[Image.Image] = []
        reasons: dict[str, str] = {}
        for column, value in images:
            feature = image_feature(features.get(column)) or ImageFeature()
            decode = functools.partial(decode_stored, value, feature, column, where)
            image, reason = read_or_blank(decode, self.completion.on_bad_image)
            decoded.append(image)
            reasons |= {"clean_image" if column == "clean_image" else "image": reason} if reason else {}
        if kind == "images":
            return {**row, "images": decoded}, reasons
        return {**row, **dict(zip(("image", "clean_image"), decoded, strict=False))}, reasons

    def _attacked(self, drawn: TypographicStream, row: StreamRow, where: str) -> tuple[Row, dict[str, str]]:
        """Return a row as drawn by the attack, and by column why its images can't be read."""
        label, weight = drawn.label_and_weight(row.values, where)
        words = drawn.words(label, row.number, row.epoch)
        clean, reason = self._decoded(row.values, drawn.image_column, where)
        attacked = clean if reason else drawn.attacked(clean, words, row.number, row.epoch)
        images = {"image": attacked, "clean_image": clean}
        reasons = dict.fromkeys(images, reason) if reason else {}
        return {**drawn.preference(label, words), "weight": weight, **images}, reasons

    def _decoded(self, values: Row, column: str, where: str) -> tuple[Image.Image, str]:
        """Return an image of a row in RGB and ""; or, where it can't be read, a blank one and the reason."""
        feature = (self._stream.features or {}).get(column)
        feature = feature if isinstance(feature, ImageFeature) else ImageFeature()
        decode = functools.partial(_decode, dataclasses.replace(feature, decode=True), values[column], column, where)
        return read_or_blank(decode, self.completion.on_bad_image)


def _check_no_array(values: Row, where: str) -> None:
    """Raise if a column holds an array, which is no fault of the row: a format stays where a map or filter uses it."""
    for column, value in values.items():
        if isinstance(value, (np.ndarray, Tensor)):
            raise TypeError(
                f"{where}: column {column!r} holds a {type(value).__name__}. If the stream got a format before its "
                "map or filter, remove it there: stream.with_format(None). An array becomes an image by "
                "PIL.Image.fromarray."
            )


def _decode(feature: ImageFeature, value: Any, column: str, where: str) -> Image.Image:
    try:
        if value is None:
            raise ValueError("there is none")
        # datasets 4.7 to 5.0 decode every image of a mapped stream.
        return to_rgb(value if isinstance(value, Image.Image) else feature.decode_example(value))
    except Exception as error:  # decoders of broken files raise anything from OSError to SyntaxError
        path = value.get("path") if isinstance(value, Mapping) else None
        raise unreadable_image(error, repr(column), where, path, drop="stream.filter") from error


def is_stream(dataset: Any) -> TypeGuard[IterableDataset | TypographicStream]:
    """Return whether a dataset is one that `checked_stream` accepts.

    Args:
        dataset: Any value.

    Returns:
        True for a `datasets.IterableDataset` and a `TypographicStream`.
    """
    return isinstance(dataset, (IterableDataset, TypographicStream))


def checked_stream(
    preferences: IterableDataset | TypographicStream,
    regularization: Dataset | None,
    candidate_texts: CandidateTexts,
    args: ContrastivePOConfig,
    name: str,
) -> StreamedPairs:
    """Return the preference pairs of a stream whose columns are checked. Its rows are checked as they arrive.

    Args:
        preferences: As for `StreamedPairs`.
        regularization: Ordinary images, or None to take each row's `clean_image`.
        candidate_texts: The candidate texts of every row, if any.
        args: Losses, `reg_weight`, number and size of batches, seed, and what to do with unreadable images.
        name: Name of the preferences in messages.

    Returns:
        The pairs of a run of `max_steps` optimizer steps.

    Raises:
        ValueError: If `max_steps` <= 0, if `precompute_ref_log_probs`, `embeddings_cache` or `dataloader_drop_last` is
            set, if the stream was split by `split_dataset_by_node`, if its columns or the texts of its attack don't
            suit the losses or the candidate texts, or if images that the losses or `reg_weight` need are missing.
        TypeError: If `regularization` is used and is not a `datasets.Dataset`.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"{name} is streamed and has no length, so max_steps must say after how many optimizer steps training "
            f"ends, got {args.max_steps}. A pass over N rows takes about N / (batch size of all processes and "
            "accumulation steps)."
        )
    unsuited = {
        "precompute_ref_log_probs": args.precompute_ref_log_probs,
        "embeddings_cache": args.embeddings_cache,
        "dataloader_drop_last": args.dataloader_drop_last,
    }
    for argument, value in unsuited.items():
        if value:
            raise ValueError(
                f"{argument}={value!r}, but {name} is streamed: its rows are read once, in whole batches. Leave the "
                "argument out, or load the data without streaming=True."
            )
    if _rows(preferences)._distributed is not None:
        raise ValueError(
            f"{name} was split by split_dataset_by_node, but the trainer distributes rows over the processes itself. "
            "Give every process the whole stream."
        )
    anchored = False
    if isinstance(preferences, TypographicStream):
        preferences.check(candidate_texts, args.loss_type, name)
        columns = list(preferences.column_names)
    else:
        columns = columns_of(preferences, name)
        check_column_names(columns, preferences.features, name)
        if anchored := has_kinds(columns, preferences.features):
            kinds = possible_kinds(columns)
            check_losses(kinds, args.loss_type, name)
            fit_candidates(kinds, "candidates" in columns, regularization, candidate_texts, args, name)
        else:
            check_losses(["texts"], args.loss_type, name)
            check_columns(columns, candidate_texts.texts, args.loss_type, name)
            check_types(preferences, name)
            if "chosen" not in columns:
                check_candidate_positions(preferences.features, candidate_texts.texts or (), name)
    check_grade_columns(columns, args, name)
    source, targets = image_sources(columns, regularization, args, name)
    return StreamedPairs(
        preferences,
        batches=args.max_steps * args.gradient_accumulation_steps,
        multiple=args.train_batch_size * args.world_size,
        loss_types=args.loss_type,
        regularization=source,
        candidate_texts=candidate_texts,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        name=name,
        targets=targets,
        on_bad_image=args.on_bad_image,
        anchored=anchored,
    )


def _rows(preferences: IterableDataset | TypographicStream) -> IterableDataset:
    """Return the data set that is read: the preferences themselves, or the images under an attack."""
    return preferences.stream if isinstance(preferences, TypographicStream) else preferences
