"""clip-po score: rank texts for images and images for texts, row by row, divided among processes."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets.utils import tqdm

from clip_po.cli.flags import FlagParser, parse_flags
from clip_po.cli.precision import precision_defaults
from clip_po.cli.score_arguments import IMAGES, TEXTS, ScoreArguments
from clip_po.data.candidate_rows import CandidateRow, folder_rows, table_rows
from clip_po.data.row_files import row_writer
from clip_po.scoring.ranking import SCHEMA, BestImages, Line
from clip_po.scoring.row_scores import PreparedRow, prepare_row, score_rows
from clip_po.scoring.scorer import Scorer
from clip_po.validation import check_writable


def main(argv: Sequence[str]) -> None:
    """Score a table or a folder of images, and write the rankings."""
    (args,) = parse_flags(FlagParser([ScoreArguments], "score"), argv)
    texts = args.shared_texts()
    accelerator = Accelerator()
    if args.output_file is not None and accelerator.is_main_process:
        check_writable(Path(args.output_file).parent, "--output_file")
    in_bf16 = precision_defaults(argv).get("bf16", False) if args.bf16 is None else args.bf16
    scorer = Scorer(
        args.model_name_or_path,
        device=accelerator.device,
        batch_size=args.batch_size,
        precision=torch.bfloat16 if in_bf16 else None,
    )
    if texts is not None and ranks_images(args, texts):
        parts = rank_images(args, scorer, accelerator, texts)
    else:
        parts = rank_candidates(args, scorer, accelerator, texts)
    if accelerator.is_main_process:
        write(args.output_file, parts)
    else:
        for _ in parts:
            pass  # each part takes the work of all processes
    accelerator.end_training()  # a process that exits with its group open may abort


def ranks_images(args: ScoreArguments, texts: Sequence[str]) -> bool:
    """Return whether all images are ranked for each of the shared texts."""
    return (args.rank or (IMAGES if len(texts) == 1 else TEXTS)) == IMAGES


def read_candidates(args: ScoreArguments, texts: Sequence[str] | None) -> Iterator[CandidateRow]:
    """Return the rows of --dataset_name."""
    path = Path(str(args.dataset_name))
    if path.is_dir():
        return folder_rows(path, texts or ())
    return table_rows(path, args.image_column, args.text_column, texts)


def write(file: str | None, parts: Iterator[list[Line]]) -> None:
    """Write the lines as they come, and say on standard error what could not be scored.

    Args:
        file: As for `row_writer`.
        parts: Lines in their order.

    Raises:
        ValueError: If there is nothing to score, or nothing could be scored.
    """
    scored, failed, first = 0, 0, ""
    with row_writer(file, SCHEMA) as write_lines:
        for lines in parts:
            write_lines(lines)
            errors = [line["error"] for line in lines if line.get("error")]
            scored, failed, first = (
                scored + len(lines) - len(errors),
                failed + len(errors),
                first or "".join(errors[:1]),
            )
        if not scored:
            raise ValueError(first or "There are no rows to score. Give a table with at least one row.")
    if failed:
        print(f"{failed} images or rows could not be scored; the column `error` says why. {first}", file=sys.stderr)


def rank_candidates(
    args: ScoreArguments, scorer: Scorer, accelerator: Accelerator, texts: Sequence[str] | None
) -> Iterator[list[Line]]:
    """Rank the candidates of each row. Every process must read all that this function yields.

    Args:
        args: Arguments of the command.
        scorer: The checkpoint.
        accelerator: Divides the rows among its processes.
        texts: The texts of every row; None if each row has its own.

    Yields:
        The lines of the next rows, in the order of the rows.
    """
    for share in own_shares(args, scorer, accelerator, texts):
        yield gather_object([line for row in score_rows(scorer, share) for line in row.lines(args.top_k)])


def rank_images(
    args: ScoreArguments, scorer: Scorer, accelerator: Accelerator, texts: Sequence[str]
) -> Iterator[list[Line]]:
    """Rank all images for each text. Every process must read all that this function yields.

    Args:
        args: Arguments of the command.
        scorer: The checkpoint.
        accelerator: Divides the images among its processes.
        texts: The texts.

    Yields:
        The lines, text by text, and then those of the images that can't be read.

    Raises:
        ValueError: If a row has several images.
    """
    best, errors = BestImages(texts, args.top_k), []
    for share in own_shares(args, scorer, accelerator, texts):
        rows = list(score_rows(scorer, share))
        numbers = [row.prepared.row.number for row in rows for _ in row.images]
        if len(set(numbers)) < len(numbers):
            raise ValueError("--rank images needs one image in each row; a row has several. Give each its own row.")
        if found := [row for row in rows if row.images]:
            names, cosines, logits = zip(*((row.images[0], row.cosines, row.logits) for row in found), strict=True)
            best.add(numbers, names, np.concatenate(cosines), np.concatenate(logits))
        errors += [line for row in share for line in row.error_lines()]
    parts = gather_object([(best, errors)])
    total = BestImages(texts, args.top_k)
    for part, _ in parts:
        total.merge(part)
    yield list(total.lines())
    yield sorted((line for _, failed in parts for line in failed), key=lambda line: line["row"])


def own_shares(
    args: ScoreArguments, scorer: Scorer, accelerator: Accelerator, texts: Sequence[str] | None
) -> Iterator[list[PreparedRow]]:
    """Read the rows that this process scores, a share ahead of the model.

    All processes get the same number of shares. The last ones may be empty.

    Args:
        args: Arguments of the command.
        scorer: Prepares the images.
        accelerator: Divides the rows among its processes.
        texts: The texts of every row; None if each row has its own.

    Yields:
        Up to `batch_size` rows.
    """
    rows = read_candidates(args, texts)
    size, rank, processes = args.batch_size, accelerator.process_index, accelerator.num_processes
    bar = tqdm(desc="Scoring", unit="row", disable=not accelerator.is_main_process)
    with bar, ThreadPoolExecutor(args.num_workers) as threads:
        ahead: deque[tuple[int, Iterator[PreparedRow]]] = deque()
        while taken := list(itertools.islice(rows, size * processes)):
            share = taken[rank * size : (rank + 1) * size]
            ahead.append((len(taken), threads.map(prepare_row, share, itertools.repeat(scorer))))
            if len(ahead) > 1:
                yield from _finished(ahead, bar)
        while ahead:
            yield from _finished(ahead, bar)


def _finished(ahead: deque[tuple[int, Iterator[PreparedRow]]], bar: tqdm) -> Iterator[list[PreparedRow]]:
    count, share = ahead.popleft()
    yield list(share)
    bar.update(count)
