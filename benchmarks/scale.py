"""Memory, bytes exchanged and seconds of one step, on paper: prints every table of docs/scale.md.

    python benchmarks/scale.py --plot docs/images/scale.png

No model runs. The numbers come from scale_formulas.py and from the constants below, which are the published figures of
a GPU vendor and assumed shares of them. Pass the constants of your own machine to get your own tables. scale_check.py
compares the formulas with the memory and time of real steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scale_formulas import (
    FLOAT,
    MODELS,
    Machine,
    Step,
    candidate_bytes,
    candidate_flops,
    concept_flops,
    exchange_seconds,
    exchanged,
    image_flops,
    memory,
    peak,
    seconds,
    step_flops,
    straight_flops,
    text_activation_bytes,
    text_flops,
    text_parameters,
    tokens_of,
    vision_parameters,
)

from clip_po.evaluation.tables import format_table

KILO, MEGA, GIGA, TERA = 1e3, 1e6, 1e9, 1e12
USABLE = 0.9
"""Share of a GPU's memory that a step may fill. The context and the allocator need the rest."""
PROMPT = 10
"""Tokens of a prompt such as "a photo of a golden retriever", with its start and end."""
FLEETS = (64, 256)
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "LoRA": {"rank": 16},
    "LoRA, checkpointing": {"rank": 16, "checkpointing": True},
    "LoRA, last 4 blocks": {"rank": 16, "blocks": 4},
}
SHOWN = ("B/32", "L/14", "H/14", "bigG/14")

Table = tuple[list[str], list[list[str]]]


def sizes() -> Table:
    rows = []
    for name, config in MODELS.items():
        v, t = config.vision_config, config.text_config
        rows.append(
            [
                name,
                f"{v.num_hidden_layers} x {v.hidden_size} ({v.intermediate_size})",
                str(tokens_of(v)),
                f"{t.num_hidden_layers} x {t.hidden_size}",
                str(config.projection_dim),
                f"{vision_parameters(config) / MEGA:.1f}",
                f"{text_parameters(config) / MEGA:.1f}",
                f"{Step(config, rank=16).trained / MEGA:.2f}",
                f"{image_flops(config) / GIGA:.1f}",
                f"{text_flops(config, PROMPT) / GIGA:.2f}",
            ]
        )
    columns = ["model", "image blocks x width (inner)", "tokens", "text blocks x width", "D", "image, M", "text, M"]
    return [*columns, "LoRA, M", "image, GFLOP", "prompt, GFLOP"], rows


def shares(pairs: int, candidates: int) -> Table:
    """Return the operations of a step divided by the operations of the straight step."""
    columns = ["way", *SHOWN]
    rows = []
    for way, options in WAYS.items():
        for seen, images in ((0, "fixed images"), (1, "fresh attack")):
            steps = [Step(MODELS[name], pairs, candidates, seen=seen, **options) for name in SHOWN]
            straight = [straight_flops(step.config, pairs, candidates, PROMPT) for step in steps]
            found = [f"{step_flops(step) / all_of_it:.2f}" for step, all_of_it in zip(steps, straight, strict=True)]
            rows.append([f"{way}, {images}", *found])
    concept = [concept_flops(MODELS[n], pairs, candidates) for n in SHOWN]
    straight = [straight_flops(MODELS[n], pairs, candidates, PROMPT) for n in SHOWN]
    rows.append(["transformation", *(f"{a / b:.4f}" for a, b in zip(concept, straight, strict=True))])
    return columns, rows


def parts(pairs: int, candidates: int) -> Table:
    """Return the memory by part, full and with LoRA, of one GPU among several."""
    rows = []
    for name in MODELS:
        for way in ("full", "LoRA"):
            step = Step(MODELS[name], pairs, candidates, gpus=2, averaged=True, **WAYS[way])
            rows.append([name, way, *(_giga(part) for part in memory(step).values()), _giga(peak(step))])
    return ["GB", "way", *memory(step), "peak"], rows


def fits(capacity: float, candidates: int) -> Table:
    """Return the largest number of pairs in a micro-batch that fits."""
    sharded = {"FSDP2 of 8, full": {"sharded": True}, "with checkpointing": {"sharded": True, "checkpointing": True}}
    ways = {way: {**options, "gpus": 2} for way, options in WAYS.items()}
    ways |= {way: {**options, "gpus": 8} for way, options in sharded.items()}
    rows = [
        [name, *(str(_most(Step(config, 1, candidates, **options), capacity)) for options in ways.values())]
        for name, config in MODELS.items()
    ]
    return [f"pairs in {capacity / GIGA:.0f} GB", *ways], rows


def _most(step: Step, capacity: float) -> int:
    """Solve for the pairs: peaks grow linearly with them, except during the optimizer's step."""
    low, high = 0, 1 << 14
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(replace(step, pairs=middle)) <= USABLE * capacity else (low, middle - 1)
    return low


def candidate_table(name: str, pairs: int, machine: Machine) -> Table:
    config, rows = MODELS[name], []
    rate = machine.flops * machine.utilisation
    for count in (10, 100, 1000, 10_000, 100_000):
        step = Step(config, pairs, count)
        encode = count * text_flops(config, PROMPT) / rate
        logits = candidate_flops(step) / (machine.flops_float * machine.utilisation)
        kept = text_activation_bytes(config, count, PROMPT)
        towers = step_flops(step) / rate
        rows.append(
            [
                f"{count:,}",
                _giga(candidate_bytes(step)),
                _milliseconds(logits),
                f"{encode:.3f}",
                f"{(towers + logits) / towers:.3f}",
                _giga(kept),
                f"{(towers + logits + 3 * encode) / towers:.2f}",
            ]
        )
    columns = ["candidates", "GB", "logits, ms a step", "encoding once, s", "step"]
    return [*columns, "GB more where the text tower trains", "step then"], rows


def exchange_table(pairs: int, machine: Machine) -> Table:
    columns = ["model", "way", "MB sent by a GPU of 8", "8 GPUs, NVLink, ms"]
    networks = {"400 Gb/s": 50e9, "100 Gb/s": 12.5e9}
    columns += [f"{n} GPUs, {link}, ms" for n in FLEETS for link in networks]
    rows = []
    for name in SHOWN:
        ways = {"DDP, full": {}, "FSDP2, full": {"sharded": True}}
        ways |= {"DDP, LoRA": {"rank": 16}, "FSDP2, LoRA": {"rank": 16, "sharded": True}}
        for way, options in ways.items():
            one = Step(MODELS[name], pairs, gpus=8, **options)
            times = [exchange_seconds(one, machine)] + [
                exchange_seconds(replace(one, gpus=n), replace(machine, between=speed))
                for n in FLEETS
                for speed in networks.values()
            ]
            rows.append([name, way, f"{exchanged(one) / MEGA:,.1f}", *map(_milliseconds, times)])
    return columns, rows


def step_table(pairs: int, candidates: int, machine: Machine) -> Table:
    """Return milliseconds of a step, and pairs per second and GPU relative to one GPU alone."""
    networks = {400: 50e9, 100: 12.5e9}
    runs = [(1, 400), (8, 400), (64, 400), (256, 400), (64, 100), (256, 100)]
    columns = ["model", "way", "GB", "1 GPU, ms", "pairs/s", "8 GPUs"]
    columns += [f"{n} GPUs, {link} Gb/s" for n, link in runs[2:]]
    rows = []
    for name, config in MODELS.items():
        for way in ("full", "LoRA"):
            times = [
                seconds(Step(config, pairs, candidates, n, **WAYS[way]), replace(machine, between=networks[link]))
                for n, link in runs
            ]
            alone = times[0]["step"]
            efficiency = [f"{alone / found['step']:.2f}" for found in times[1:]]
            held = _giga(peak(Step(config, pairs, candidates, gpus=2, **WAYS[way])))
            rows.append([name, way, held, f"{alone * KILO:.1f}", f"{pairs / alone:.0f}", *efficiency])
    return columns, rows


def loader_table(pairs: int, machine: Machine) -> Table:
    ways = ("full", "LoRA", "LoRA, last 4 blocks")
    rows = []
    for name, config in MODELS.items():
        speeds = [pairs / seconds(Step(config, pairs, **WAYS[way]), machine)["step"] for way in ways]
        cores = [f"{speed / machine.rows:.1f}" for speed in speeds]
        rows.append([name, *cores, f"{max(speeds) * machine.file / MEGA:,.0f}"])
    return ["cores a GPU", *ways, "MB of files a second, at most"], rows


def cache_table(name: str, machine: Machine) -> Table:
    config = MODELS[name]
    rows = []
    for count in (10_000, 1_000_000, 10_000_000, 100_000_000):
        size = FLOAT * count * config.projection_dim
        hours = count * image_flops(config) / (machine.flops * machine.utilisation) / 3600
        rows.append([f"{count:,}", f"{size / GIGA:.2f}", f"{8 * size / GIGA:.1f}", f"{hours:.3f}"])
    return ["images", "GB a process", "GB a node of 8 processes", "GPU hours to fill"], rows


def concept_table(pairs: int, candidates: int) -> Table:
    rows = []
    for name in SHOWN:
        config = MODELS[name]
        dim = config.projection_dim
        trained = dim**2
        rows.append(
            [
                name,
                f"{trained / MEGA:.2f}",
                f"{4 * FLOAT * trained / MEGA:.1f}",
                f"{2 * FLOAT * trained * 7 / 8 / MEGA:.1f}",
                f"{concept_flops(config, pairs, candidates) / GIGA:.1f}",
                f"{step_flops(Step(config, pairs, candidates)) / GIGA:,.0f}",
            ]
        )
    return (
        [
            "model",
            "W, M",
            "W, gradient, optimizer, MB",
            "MB sent by a GPU of 8",
            "GFLOP a step",
            "full tower's, GFLOP",
        ],
        rows,
    )


def draw(file: Path, pairs: int, candidates: int, machine: Machine) -> None:
    """Plot memory by part against model size, and the share of their speed that many GPUs keep."""
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(5, 4))
        groups = {
            "weights, reference": ("weights", "reference", "bf16 weights"),
            "gradients, optimizer, average": ("optimizer", "average", "buckets", "gradients"),
            "activations": ("activations", "candidates"),
        }
        bars = [(name, way) for name in MODELS for way in ("full", "LoRA")]
        starts = [0.0] * len(bars)
        for (label, names), colour in zip(groups.items(), ("#0072b2", "#e69f00", "#56b4e9"), strict=True):
            heights = []
            for name, way in bars:
                found = memory(Step(MODELS[name], pairs, candidates, gpus=2, averaged=True, **WAYS[way]))
                heights.append(sum(found[part] for part in names) / GIGA)
            left.bar(range(len(bars)), heights, 0.8, starts, label=label, color=colour)
            starts = [start + height for start, height in zip(starts, heights, strict=True)]
        left.axhline(80, color="#6a717e", linewidth=1, linestyle="--")
        left.annotate("80 GB", (0.5, 80), (-1, 2), textcoords="offset points", color="#6a717e")
        left.set_xticks(range(len(bars)), [f"{name}\n{way}" for name, way in bars], rotation=90)
        left.set_ylabel(f"GB, {pairs} pairs a GPU")
        left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.62))
        batches = [2**power for power in range(2, 11)]
        shown = ("B/32", "B/16", "L/14", "L/14-336")
        for name, colour in zip(shown, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True):
            for speed, dash in ((50e9, "-"), (12.5e9, "--")):
                linked = replace(machine, between=speed)
                kept = []
                for size in batches:
                    alone, together = (seconds(Step(MODELS[name], size, gpus=n), linked)["step"] for n in (1, 64))
                    kept.append(alone / together)
                label = f"{name}, {8 * speed / GIGA:.0f} Gb/s"
                right.plot(batches, kept, dash, color=colour, label=label)
        right.set_xscale("log", base=2)
        right.set_xticks(batches, [str(size) for size in batches])
        right.set_ylim(0, 1.05)
        right.set_xlabel("pairs a GPU")
        right.set_ylabel("speed of each of 64 GPUs, of one alone; full, DDP")
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(file, dpi=110)


def _giga(size: float) -> str:
    return f"{size / GIGA:.2f}"


def _milliseconds(time: float) -> str:
    return f"{time * KILO:.2f}" if time < 0.1 else f"{time * KILO:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="pairs per GPU")
    parser.add_argument("--candidates", type=int, default=1000)
    for name, unit in (
        ("flops", "operations a second of a GPU in bf16"),
        ("flops_float", "operations a second of a GPU in float32"),
        ("utilisation", "share of these that is reached"),
        ("memory_bandwidth", "bytes a second of a GPU's memory"),
        ("within", "bytes a second that a GPU sends within its node"),
        ("links", "share of the bandwidths that is reached"),
        ("cores", "CPU cores a GPU"),
        ("rows", "pairs a second that a core reads, attacks and turns to pixels"),
        ("file", "bytes of an image file"),
    ):
        parser.add_argument(f"--{name}", type=float, default=getattr(Machine(), name), help=unit)
    parser.add_argument("--node", type=int, default=Machine().node, help="GPUs per node")
    parser.add_argument("--plot", type=Path, help="also write the plot to this file")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if hasattr(Machine(), name)}
    machine = Machine(**given)
    tables: dict[str, Callable[[], Table]] = {
        "Sizes": sizes,
        "Operations of a step, of the straight step's": lambda: shares(16, 100),
        "Memory by part": lambda: parts(args.pairs, args.candidates),
        "Pairs that fit, 80 GB": lambda: fits(80 * GIGA, args.candidates),
        "Pairs that fit, 24 GB": lambda: fits(24 * GIGA, args.candidates),
        "Candidates, L/14": lambda: candidate_table("L/14", args.pairs, machine),
        "Exchange": lambda: exchange_table(args.pairs, machine),
        "Steps": lambda: step_table(args.pairs, args.candidates, machine),
        "Cores that keep a GPU busy": lambda: loader_table(args.pairs, machine),
        "Cache of the reference, L/14": lambda: cache_table("L/14", machine),
        "Transformation": lambda: concept_table(args.pairs, args.candidates),
    }
    found: dict[str, Any] = {"machine": vars(machine)}
    for title, make in tables.items():
        columns, rows = make()
        print(f"{title}\n\n{format_table(columns, rows)}\n")
        found[title] = [dict(zip(columns, row, strict=True)) for row in rows]
    if args.plot is not None:
        draw(args.plot, args.pairs, args.candidates, machine)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
