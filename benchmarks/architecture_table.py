"""Train every architecture on every row format for three steps, and reload what is saved in plain transformers.

    python benchmarks/architecture_table.py [--architectures siglip align] [--formats preferences]

The models are tiny and random, so that a cell takes seconds. A cell trains, saves, loads the folder with
`transformers.AutoModel`, and compares the embeddings that transformers computes with those of the model in training.
The table shows the largest difference of a number in a unit-norm embedding, and the seconds that a cell took.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModel, AutoProcessor, PrinterCallback
from transformers.utils import logging

from clip_po import ContrastivePOConfig, ContrastivePOTrainer, TypographicAttack, TypographicPreferences
from clip_po.data.images import to_pixels
from clip_po.encoding import encode_images, encode_texts
from clip_po.evaluation.tables import format_table

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where the tiny models and pictures are

from dual_encoders import KINDS, POSITIONS, tiny_dual_encoder
from samples import (
    CLASSES,
    PROMPTS,
    make_captioned,
    make_image_pairs,
    make_labelled,
    make_preferences,
    make_unpaired,
    picture,
)

STEPS = 3
ROWS = 8


@dataclass(frozen=True)
class Format:
    """Rows of a format, and the arguments of a run on them.

    Attributes:
        rows: Makes the training rows.
        arguments: Arguments of `ContrastivePOConfig`.
        candidate_texts: The candidate texts of every row, or None.
        reg_dataset: Makes the regularization images, or None.
    """

    rows: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    candidate_texts: list[str] | None = None
    reg_dataset: Callable[[], Any] = lambda: None


def typographic():
    """Labelled images, on which the attack writes."""
    attack = TypographicAttack(words=CLASSES, min_side=32, size=(0.3, 0.5))
    return TypographicPreferences(make_labelled(ROWS), attack)


def classes():
    """Images with the number of the right class and that of a wrong one."""
    labelled = make_labelled(ROWS)
    wrong = [(label + 1) % len(CLASSES) for label in labelled["label"]]
    return labelled.add_column("rejected_label", wrong)


def graded():
    """Preferences between texts, each with how much better the chosen one is."""
    return make_preferences(ROWS).add_column("margin", [row / ROWS for row in range(ROWS)])


def pick_a_pic():
    """Two images of a caption, one of which is better, or neither."""
    better = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    columns = {
        "caption": [PROMPTS[row % len(PROMPTS)] for row in range(ROWS)],
        "jpg_0": [picture(row) for row in range(ROWS)],
        "jpg_1": [picture(100 + row) for row in range(ROWS)],
        **{f"label_{side}": [better[row % 3][side] for row in range(ROWS)] for side in (0, 1)},
    }
    rows = datasets.Dataset.from_dict(columns)
    return rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())


FORMATS = {
    "typographic": Format(typographic),
    "preferences": Format(lambda: make_preferences(ROWS)),
    "classes": Format(classes, {"reg_weight": 0.0}, PROMPTS),
    "graded": Format(graded, {"loss_type": "sigmoid"}),
    "image_pairs": Format(lambda: make_image_pairs(ROWS, rejected=2), {"reg_weight": 0.0}),
    "pick_a_pic": Format(pick_a_pic, {"loss_type": "sigmoid", "reg_weight": 0.0}),
    "unpaired": Format(lambda: make_unpaired(ROWS), {"loss_type": "kto", "reg_weight": 0.0}, PROMPTS),
    "captioned": Format(lambda: make_image_pairs(ROWS), reg_dataset=lambda: make_captioned(ROWS)),
}


@dataclass(frozen=True)
class Cell:
    """What a cell measures.

    Attributes:
        difference: Largest absolute difference of an embedding after reloading.
        moved: Largest absolute difference of an embedding of an image that training made.
        seconds: Time of training, saving and reloading.
    """

    difference: float
    moved: float
    seconds: float


PICTURES = [picture(number) for number in range(3)]


@torch.no_grad()
def embeddings(model, processor):
    """Embeddings of three images and of the candidate texts, as the package computes them."""
    return encode_images(model.eval(), to_pixels(processor, PICTURES)), encode_texts(model, processor, PROMPTS)


@torch.no_grad()
def plain_embeddings(folder):
    """The same from a folder, by transformers alone."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(PROMPTS, padding="max_length", max_length=POSITIONS, return_tensors="pt")
    outputs = model(**processor.image_processor(PICTURES, return_tensors="pt"), **tokens)
    return outputs.image_embeds, outputs.text_embeds


def largest_difference(first, second):
    return max((one - other).abs().max().item() for one, other in zip(first, second, strict=True))


def run_cell(kind: str, form: str, folder: Path) -> Cell:
    """Train a tiny model, save it and reload it.

    Args:
        kind: One of `KINDS`.
        form: One of `FORMATS`.
        folder: Where models are written.

    Returns:
        What was measured.
    """
    start, aligned = folder / "start", folder / "aligned"
    tiny_dual_encoder(kind, start)
    chosen = FORMATS[form]
    began = time.time()
    args = ContrastivePOConfig(
        str(folder / "run"),
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "log_level": "error", **chosen.arguments},
    )
    trainer = ContrastivePOTrainer(
        str(start),
        args=args,
        train_dataset=chosen.rows(),
        reg_dataset=chosen.reg_dataset(),
        candidate_texts=chosen.candidate_texts,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(aligned)
    reloaded, trained = plain_embeddings(aligned), embeddings(trainer.model, trainer.processing_class)
    seconds = time.time() - began
    return Cell(largest_difference(reloaded, trained), largest_difference(reloaded, plain_embeddings(start)), seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rows = []
    for kind in args.architectures:
        line = [kind]
        for form in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                cell = run_cell(kind, form, Path(folder))
            line.append(f"{cell.difference:.1e} ({cell.seconds:.1f} s)")
        rows.append(line)
    print(format_table(["architecture", *args.formats], rows))


if __name__ == "__main__":
    main()
