"""Train the embedded model on typographic digits with each loss of pairs, and print what each reaches.

    python benchmarks/losses.py [--losses hinge ipo] [--betas 0.3 1] [--output losses.json]

Every loss gets the same rows, the same regularization (`reg_weight=1`) and the settings of `clip-po demo`, in
bfloat16 on the CPU. beta is chosen for each loss on validation digits: the highest typographic accuracy at a clean
cost of at most one point, or if there is none the lowest cost. The table shows test digits, with fonts and positions
that training did not use. A loss takes about a minute.
Results are kept in the output file, so that the losses can be run in parts.
"""

import argparse
import json
import tempfile
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
            load_model(str(MODEL_PATH), attn_implementation="eager"),  # the fast way in bfloat16 on a CPU
            args=ContrastivePOConfig(folder, seed=seed, reg_weight=1.0, bf16=True, use_cpu=True, **settings),
            train_dataset=rows,
            processing_class=processor,
            candidate_texts=rows.candidate_texts,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def measured(models, split, renderings, processor, seed):
    """Return the metrics of each model beside "before"."""
    _, answers = measure(models, split, renderings, processor, seed)
    found = {name: robustness_report(answers, name, "before", resamples=200) for name in models if name != "before"}
    metrics = ("typographic_accuracy", "clean_cost", "recovery")
    return {name: {metric: report[metric].value for metric in metrics} for name, report in found.items()}


def preferred(found):
    """Order of the results of several betas."""
    cheap = found["validation"]["clean_cost"] <= MOST_COST
    return (cheap, found["validation"]["typographic_accuracy"] if cheap else -found["validation"]["clean_cost"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=OF_PAIRS, choices=OF_PAIRS)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.3, 1.0])
    parser.add_argument("--output", type=Path, default=Path("losses.json"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    digits = load_digits_dataset("train", 1, seed=0)
    rows = TypographicPreferences(digits, digit_attack("training", seed=0), DIGIT_NAMES, PROMPT_TEMPLATE)
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for loss_type in args.losses:
        betas = args.betas if "beta" in LOSSES[loss_type].settings else [None]
        todo = {f"{loss_type} {beta}": beta for beta in betas if f"{loss_type} {beta}" not in found}
        if not todo:
            continue
        models = {name: align(loss_type, beta or 1.0, rows, processor) for name, beta in todo.items()}
        models = {"before": load_model(str(MODEL_PATH)), **models}
        validation = measured(models, "validation", 2, processor, seed=100)
        test = measured(models, "test", 2, processor, seed=0)
        for name, beta in todo.items():
            found[name] = {"loss_type": loss_type, "beta": beta, "validation": validation[name], "test": test[name]}
            print(name, validation[name], flush=True)
        args.output.write_text(json.dumps(found, indent=2))
    best = [
        max((result for result in found.values() if result["loss_type"] == name), key=preferred)
        for name in OF_PAIRS
        if any(result["loss_type"] == name for result in found.values())
    ]
    columns = ("loss", "beta", "typographic accuracy, %", "recovery, %", "clean cost, points")
    table = [
        [
            one["loss_type"],
            "" if one["beta"] is None else f"{one['beta']:g}",
            *(f"{100 * one['test'][metric]:.1f}" for metric in ("typographic_accuracy", "recovery")),
            f"{one['test']['clean_cost']:.1f}",
        ]
        for one in best
    ]
    print(format_table(columns, table))


if __name__ == "__main__":
    main()
