"""Train the embedded model on typographic digits with each loss of pairs, and print what each reaches.

    python benchmarks/losses.py [--losses hinge ipo] [--betas 0.1 1] [--output losses.json]

Every loss gets the same rows, the same regularization and the settings of `clip-po demo`. beta is chosen for each loss
on validation digits: the highest typographic accuracy at a clean cost of at most one point, or if there is none the
lowest cost. The table shows test digits, with fonts and positions that training did not use. Results are kept in the
output file, so that the losses can be run in parts.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import CLIPProcessor, PrinterCallback
from transformers.utils import logging

from clip_po.cli.demo import TRAINING, measure
from clip_po.config import ContrastivePOConfig
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.robustness import robustness_report
from clip_po.evaluation.tables import format_table
from clip_po.losses import LABEL_FREE, LOSSES, UNPAIRED
from clip_po.models import load_model
from clip_po.trainer import ContrastivePOTrainer

OF_PAIRS = [name for name in LOSSES if name not in LABEL_FREE | UNPAIRED | {"sigmoid_norm"}]
SETTINGS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
MOST_COST = 1.0


def align(loss_type, beta, rows, processor, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        settings = {**TRAINING, "loss_type": [loss_type], "beta": beta, **SETTINGS.get(loss_type, {})}
        trainer = ContrastivePOTrainer(
            load_model(str(MODEL_PATH)),
            args=ContrastivePOConfig(output_dir=folder, seed=seed, reg_weight=1.0, **settings),
            train_dataset=rows,
            processing_class=processor,
            candidate_texts=rows.candidate_texts,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def measured(model, split, renderings, processor, seed):
    _, answers = measure({"before": load_model(str(MODEL_PATH)), "after": model}, split, renderings, processor, seed)
    report = robustness_report(answers, "after", "before", resamples=200)
    return {name: report[name].value for name in ("typographic_accuracy", "clean_cost", "recovery")}


def preferred(found):
    """Order of the results of several betas."""
    cheap = found["validation"]["clean_cost"] <= MOST_COST
    return (cheap, found["validation"]["typographic_accuracy"] if cheap else -found["validation"]["clean_cost"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=OF_PAIRS, choices=OF_PAIRS)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--output", type=Path, default=Path("losses.json"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    digits = load_digits_dataset("train", 1, seed=0)
    rows = TypographicPreferences(digits, digit_attack("training", seed=0), DIGIT_NAMES, PROMPT_TEMPLATE)
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for loss_type in args.losses:
        for beta in args.betas if "beta" in LOSSES[loss_type].settings else [1.0]:
            key = f"{loss_type} {beta:g}"
            if key in found:
                continue
            began = time.time()
            model = align(loss_type, beta, rows, processor)
            result = {"loss_type": loss_type, "beta": beta}
            result["validation"] = measured(model, "validation", 3, processor, seed=100)
            result["test"] = measured(model, "test", 3, processor, seed=0)
            found[key] = result
            args.output.write_text(json.dumps(found, indent=2))
            print(f"{key}: {result['validation']} in {time.time() - began:.0f} s", flush=True)
    best = [
        max((result for result in found.values() if result["loss_type"] == name), key=preferred)
        for name in OF_PAIRS
        if any(result["loss_type"] == name for result in found.values())
    ]
    columns = ("loss", "beta", "typographic accuracy, %", "recovery, %", "clean cost, points")
    table = [
        [
            one["loss_type"],
            f"{one['beta']:g}" if "beta" in LOSSES[one["loss_type"]].settings else None,
            100 * one["test"]["typographic_accuracy"],
            100 * one["test"]["recovery"],
            one["test"]["clean_cost"],
        ]
        for one in best
    ]
    print(format_table(columns, table, digits=1))


if __name__ == "__main__":
    main()
