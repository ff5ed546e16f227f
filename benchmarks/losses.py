"""Train the embedded model on typographic digits with each loss of pairs, and print what each reaches.

    python benchmarks/losses.py [--losses hinge ipo] [--beta 0.3] [--output losses.json]

Every loss gets the same rows, the same beta, the same regularization (`reg_weight=1`) and the settings of
`clip-po demo`, in bfloat16 on the CPU. The table shows test digits, with fonts and positions that training did not
use.
Results are kept in the output file, so that the losses can be run in parts. A loss takes about half a minute.
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


def measured(model, processor):
    """Return the metrics of an aligned model on test digits."""
    models = {"before": load_model(str(MODEL_PATH)), "after": model}
    _, answers = measure(models, "test", 2, processor, seed=0)
    report = robustness_report(answers, "after", "before")
    return {metric: report[metric].value for metric in ("typographic_accuracy", "clean_cost", "recovery")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=OF_PAIRS, choices=OF_PAIRS)
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--output", type=Path, default=Path("losses.json"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    digits = load_digits_dataset("train", 1, seed=0)
    rows = TypographicPreferences(digits, digit_attack("training", seed=0), DIGIT_NAMES, PROMPT_TEMPLATE)
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for loss_type in (name for name in args.losses if name not in found):
        found[loss_type] = measured(align(loss_type, args.beta, rows, processor), processor)
        args.output.write_text(json.dumps(found, indent=2))
    table = [
        [
            loss_type,
            *(f"{100 * found[loss_type][metric]:.1f}" for metric in ("typographic_accuracy", "recovery")),
            f"{found[loss_type]['clean_cost']:.1f}",
        ]
        for loss_type in OF_PAIRS
        if loss_type in found
    ]
    print(format_table(("loss", "typographic accuracy, %", "recovery, %", "clean cost, points"), table))


if __name__ == "__main__":
    main()
