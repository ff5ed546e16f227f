"""Timing for the benchmarks: contestants take turns, each in its own process, and neighbouring rounds are compared."""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from clip_po.evaluation.report.report_file import write_json
from clip_po.evaluation.tables import format_table

Step = Callable[[], Any]

_step: Step


class Clock(TrainerCallback):
    """Record when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Record the time."""
        self.ends.append(time.perf_counter())


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments shared by the benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns per contestant; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads per contestant")
    parser.add_argument("--quick", action="store_true", help="tiny, to try the script; the figures are meaningless")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def report(args: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[Any]], found: Any) -> None:
    """Print a table and the machine. Write the figures to the file of `--json`."""
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(format_table(columns, rows))
    print(machine + (", quick: the figures are meaningless" if args.quick else ""))
    if args.json is not None:
        write_json(args.json, {"machine": machine, "quick": args.quick, "figures": found})


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child process starts at its parent's memory
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Contestant:
    """A step that is created and run in its own process, with its own peak memory.

    Args:
        make: A module-level function that returns the step. It is called once, in the new process.
        *args: Arguments of `make`.
        threads: Number of threads of the process.
    """

    def __init__(self, make: Callable[..., Step], *args: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=_make, initargs=(make, args, threads))

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def take(self) -> tuple[float, Any]:
        """Run one step. Return its seconds and its result."""
        return self._process.submit(_take).result()

    def peak(self) -> int:
        """Return the peak resident memory of its process so far, in bytes."""
        return self._process.submit(peak_memory).result()


def _make(make: Callable[..., Step], args: Sequence[Any], threads: int) -> None:
    global _step
    torch.set_num_threads(threads)
    _step = make(*args)


def _take() -> tuple[float, Any]:
    start = time.perf_counter()
    found = _step()
    return time.perf_counter() - start, found


def take_turns(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contestant's step in each round, after one warm-up round."""
    for contestant in contestants.values():
        contestant.take()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            seconds[name].append(contestant.take()[0])
    return seconds


def ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Return the median of the rounds' ratios. Steps of one round share the load of the machine."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, of, strict=True))
