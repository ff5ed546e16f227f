"""Steps per second of a concept's transformation on embeddings, compared with a step of the full image tower.

    python benchmarks/concept_step.py --batch_sizes 32 128

clip_po's trainer trains both in one run, on the embedded digits and the same fixed attacks, with precomputed reference
embeddings. The two alternate, and the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from timing import Clock
from transformers import CLIPProcessor, PrinterCallback

from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.tables import format_table
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer


def steps_per_second(rows, processor, concept: ConceptTransform | None, batch_size: int, steps: int) -> float:
    """Return steps per second, without the first step, which fills caches."""
    with tempfile.TemporaryDirectory() as folder:
        args = (ContrastivePOConfig if concept is None else ConceptConfig)(
            folder,
            max_steps=steps + 1,
            per_device_train_batch_size=batch_size,
            precompute_ref_log_probs=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        model = load_model(str(MODEL_PATH))
        trainer = (ContrastivePOTrainer if concept is None else ConceptTrainer)(
            *([model] if concept is None else [model, concept]),
            args=args,
            train_dataset=rows,
            processing_class=processor,
            candidate_texts=rows.candidate_texts,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return steps / (clock.ends[-1] - clock.ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    attack = replace(digit_attack("training"), redraw="never")
    rows = TypographicPreferences(load_digits_dataset("train"), attack, DIGIT_NAMES, PROMPT_TEMPLATE)
    dim = load_model(str(MODEL_PATH)).config.projection_dim
    table, found = [], {}
    for size in args.batch_sizes:
        full, concept = 0.0, 0.0
        for _ in range(args.rounds):
            concept = max(concept, steps_per_second(rows, processor, ConceptTransform(dim), size, 200))
            full = max(full, steps_per_second(rows, processor, None, size, 6))
        table.append([str(size), f"{concept:.0f}", f"{full:.2f}", f"{concept / full:.0f}"])
        found[size] = {"concept": concept, "full": full}
    print(format_table(["batch", "transformation, steps/s", "full tower, steps/s", "ratio"], table))
    print(f"{torch.get_num_threads()} threads")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
