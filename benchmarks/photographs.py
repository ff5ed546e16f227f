"""Align a CLIP on photographs by every method, full and with LoRA, and print what each gained and cost.

    python benchmarks/photographs.py --model path/to/clip --dataset path/to/photographs --output_dir /tmp/photographs

It runs the product's own commands, each in a process of its own, so that seconds and peak memory are those of a user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from clip_po.evaluation.report import format_table, read_report, report_estimates
from clip_po.evaluation.robustness import COLUMNS

METHODS = {
    "default (DPO + CE)": [],
    "CE": ["--loss_type", "sft", "--reg_weight", "2"],
    "DPO": ["--loss_type", "sigmoid", "--reg_weight", "2"],
    "IPO": ["--loss_type", "ipo", "--beta", "0.1", "--reg_weight", "20"],
    "KTO": ["--loss_type", "kto_pair", "--reg_weight", "1"],
}
ADAPTERS = {"full": [], "LoRA": ["--use_peft"]}


def run(arguments: list[str], log: Path) -> tuple[float, float]:
    """Run `clip-po`; returns seconds and the peak memory in GB of the largest process so far."""
    start = time.time()
    with log.open("w") as stream:
        subprocess.run(
            [sys.executable, "-m", "clip_po.cli", *arguments], check=True, stdout=stream, stderr=subprocess.STDOUT
        )
    return time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CLIPModel")
    parser.add_argument("--dataset", required=True, help="labelled images with the splits train and test")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="use that many training rows; all by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = ["--dataset_name", args.dataset]
    limit = [] if args.rows is None else ["--max_samples", str(args.rows)]
    rows, found = [], {}
    for adapter in args.adapters:
        for method in args.methods:
            name = f"{method} {adapter}"
            out = args.output_dir / "-".join(re.findall(r"\w+", name))
            train = ["train", "--model_name_or_path", args.model, *data, *limit, "--output_dir", str(out)]
            quiet = ["--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]
            seconds, memory = run(
                [*train, *METHODS[method], *ADAPTERS[adapter], *quiet], args.output_dir / f"{out.name}.log"
            )
            evaluate = ["evaluate", "--model_name_or_path", str(out), "--base_model_name_or_path", args.model, *data]
            run(evaluate, args.output_dir / f"{out.name}-evaluate.log")
            estimates = report_estimates(read_report(out / "report.json"))
            if not rows:
                rows.append(["before", *(estimates["base"].get(metric) for metric in COLUMNS), None, None])
            rows.append(
                [name, *(estimates["aligned"][metric] for metric in COLUMNS), f"{seconds:.0f}", f"{memory:.2f}"]
            )
            found[name] = {
                "metrics": {metric: estimates["aligned"][metric].as_dict() for metric in COLUMNS},
                "seconds": seconds,
                "peak_memory_gb": memory,
            }
            print(format_table(["", *COLUMNS.values(), "seconds", "GB"], [rows[0], rows[-1]]), flush=True)
    print("\n" + format_table(["", *COLUMNS.values(), "seconds", "GB"], rows))
    print(f"{os.cpu_count()} cores; seconds of training with loading and saving; peak memory of the largest process")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
