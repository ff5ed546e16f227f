"""Images per second of two processes with one thread each, compared with one process with one thread.

    python benchmarks/processes.py

clip_po's trainer trains a CLIP of the size of ViT-B/32 (CLIPConfig's defaults, random weights) on the same fixed
images, with precomputed reference embeddings. One process runs on its own; torchrun launches the two, on gloo. The
batch of each process is the same in both cases, so the global batch of two processes is twice as large, as with a
second GPU. With --fixed, the two share one global batch instead. Each image counts once for the preference and once
for the regularization. The cases alternate, and the best of several rounds counts. Peak memory is per process. Two
unrelated runs at the same time show what the machine can give to any two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from timing import Clock, peak_memory
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PrinterCallback

from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import MODEL_PATH
from clip_po.evaluation.tables import format_table
from clip_po.trainer import ContrastivePOTrainer

# What is trained, by the name of the row.
KINDS: dict[str, dict[str, Any]] = {
    "full vision tower": {},
    "both towers": {"train_text_model": True},
}
TEXTS = [f"a photo of thing {number}" for number in range(100)]


def vit(quick: bool) -> CLIPModel:
    """Return CLIPConfig's defaults, or a model with two layers per tower."""
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2} if quick else {}
    return CLIPModel(CLIPConfig(text_config=tower, vision_config=tower))


def preferences(rows: int) -> datasets.Dataset:
    """Return pictures of noise. Their content does not change the time."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(rows)]
    columns = {
        "image": pictures,
        "clean_image": pictures,
        "chosen": [TEXTS[row % 100] for row in range(rows)],
        "rejected": [TEXTS[(row + 1) % 100] for row in range(rows)],
    }
    return (
        datasets.Dataset.from_dict(columns)
        .cast_column("image", datasets.Image())
        .cast_column("clean_image", datasets.Image())
    )


def train(kind: str, batch_size: int, steps: int, quick: bool) -> dict[str, float]:
    """Train in this process. If torchrun started it, it is one of several.

    Returns:
        Images per second of all processes after the first step, which fills caches and starts DDP's buckets, and the
        peak memory of this process in MiB.
    """
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    side = {"height": 224, "width": 224}
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": 224}, side
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastivePOConfig(
            folder,
            max_steps=steps + 1,
            per_device_train_batch_size=batch_size,
            precompute_ref_log_probs=True,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **KINDS[kind],
        )
        trainer = ContrastivePOTrainer(
            vit(quick),
            args=args,
            train_dataset=preferences(2 * batch_size * processes),
            processing_class=processor,
            candidate_texts=TEXTS,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[0]
    return {
        "images_per_second": 2 * batch_size * processes * steps / seconds,
        "memory": peak_memory() / 2**20,
    }


def launched(processes: int, kind: str, batch_size: int, args: argparse.Namespace) -> dict[str, float]:
    """Do the same in separate processes, with one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--kinds", kind]
        command += ["--batch_size", str(batch_size), "--steps", str(args.steps), "--worker", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([*command, *(["--quick"] if args.quick else [])], env=environment, check=True)
        return json.loads(result.read_text())


def unrelated(kind: str, batch_size: int, args: argparse.Namespace) -> float:
    """Return images per second of two independent runs side by side, the limit of the machine."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: launched(1, kind, batch_size, args), range(2)))
    return sum(found["images_per_second"] for found in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch_size", type=int, default=16, help="preferences per step of the single process")
    parser.add_argument("--fixed", action="store_true", help="share one global batch among the two processes")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two layers per tower and one round, to try the script")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        torch.set_num_threads(1)
        found = train(args.kinds[0], args.batch_size, args.steps, args.quick)
        if PartialState().is_main_process:
            args.worker.write_text(json.dumps(found))
        if PartialState().num_processes > 1:
            PartialState().wait_for_everyone()
            PartialState().destroy_process_group()
        return
    table, results = [], {}
    for kind in args.kinds:
        best: dict[int, dict[str, float]] = {}
        apart = 0.0
        for _ in range(1 if args.quick else args.rounds):
            for processes in (1, 2):
                size = args.batch_size // processes if args.fixed else args.batch_size
                found = launched(processes, kind, size, args)
                if processes not in best or found["images_per_second"] > best[processes]["images_per_second"]:
                    best[processes] = found
            apart = max(apart, unrelated(kind, args.batch_size, args))
        one, two = best[1], best[2]
        ratio = two["images_per_second"] / one["images_per_second"]
        speeds = [f"{speed:.2f}" for speed in (one["images_per_second"], two["images_per_second"], apart)]
        ratios = [f"{ratio:.2f}", f"{apart / one['images_per_second']:.2f}"]
        table.append([kind, *speeds, *ratios, *(f"{found['memory']:.0f}" for found in (one, two))])
        results[kind] = {"one": one, "two": two, "ratio": ratio, "unrelated": apart}
    heads = ["one process, images/s", "two", "two unrelated runs", "two / one", "unrelated / one"]
    print(format_table(["trained", *heads, "one: peak MiB", "each of two: peak MiB"], table))
    batch = "global batch" if args.fixed else "batch of each process"
    print(f"{args.batch_size} preferences, each with an ordinary image, as the {batch}; one thread a process")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
