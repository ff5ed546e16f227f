"""One W compared with one W per tower, K < D and closed forms: the second table of docs/steer.md.

    python benchmarks/steer.py

The script uses the embedded digits and the images of `clip-po steer`. Each row is a transformation at t = 1. The
closed forms are computed from the same training images as the trained transformations.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import Tensor

from clip_po.cli.steer import concept_trainer
from clip_po.cli.steer_arguments import parse
from clip_po.cli.steer_data import Case, digits_case
from clip_po.concept.sweep import VariantEmbeddings, embed_variants, measure_transform
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.tables import format_table

KEPT = 0.25
"""Factor by which the projector shrinks the directions of the words."""


def with_weight(weight: Tensor, **options: str) -> ConceptTransform:
    """Return a transformation with a given W."""
    transform = ConceptTransform(len(weight), **options)
    transform.image_weight.data.copy_(weight)
    return transform


def least_squares(train: VariantEmbeddings) -> ConceptTransform:
    """Return the least-squares W for images only, which maps images with a word and clean images to clean ones."""
    clean = train.images["clean"].double()
    seen = torch.cat([train.images["typographic"].double(), clean])
    weight = torch.linalg.lstsq(seen, torch.cat([clean, clean])).solution.T
    return with_weight(weight.float(), towers="image")


def projector(train: VariantEmbeddings) -> ConceptTransform:
    """Return a shared W that shrinks the directions in which the words move the mean embedding."""
    moved = train.images["typographic"] - train.images["clean"]
    means = torch.stack([moved[torch.from_numpy(train.word == word)].mean(dim=0) for word in range(10)])
    directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[:-1]  # ten words span nine
    return with_weight(torch.eye(means.shape[1]) - (1 - KEPT) * directions.T @ directions)


def freezing_weight(case: Case, config: ContrastivePOConfig, beta: float) -> float:
    """Return the smallest penalty_weight that freezes W: half the norm of the symmetric part of the gradient."""
    alone = copy.copy(config)
    alone.beta, alone.penalty_weight = beta, 0.0
    trainer = concept_trainer(case, ConceptTransform(case.model.config.projection_dim), alone)
    loader = trainer.get_train_dataloader()
    for batch in loader:
        trainer.compute_loss(trainer.model, batch).backward()
    gradient = trainer.model.image_weight.grad / len(loader)
    return ((gradient + gradient.T) / 2).norm().item() / 2


def main(cache: str) -> None:
    """Train, compute, measure and print."""
    args, config = parse(["--disable_tqdm", "true", "--embeddings_cache", cache])
    case = digits_case(args, config.seed)
    template = [case.task.prompt_template]
    rows = case.train
    seen = RobustnessImages(rows.dataset, rows.attack, case.processor, rows.class_names)
    train, test, unseen = (
        embed_variants(case.model, images, template, batch_size=256, disable_tqdm=True)
        for images in (seen, case.test, case.unseen)
        if images is not None
    )
    dim = case.model.config.projection_dim
    trained = {
        "trained, shared": ConceptTransform(dim),
        "trained, one per tower": ConceptTransform(dim, towers="each"),
        "trained, images alone": ConceptTransform(dim, towers="image"),
        **{f"trained, K = {k}": ConceptTransform(dim, k, start="orthogonal") for k in (8, 16, 32, 48)},
    }
    for transform in trained.values():
        concept_trainer(case, transform, config).train()
    methods = {
        "nothing (t = 0)": ConceptTransform(dim),
        **trained,
        "least squares, images alone": least_squares(train),
        f"words' directions times {KEPT:g}": projector(train),
    }
    table = []
    for name, transform in methods.items():
        point, other = measure_transform(test, transform), measure_transform(unseen, transform)
        table.append([name, point.reading, point.right, point.clean_accuracy, other.reading, other.right])
    columns = ["W", "reading", "right", "clean", "reading, unseen attack", "right, unseen attack"]
    print(format_table(columns, table))
    for beta in (1.0, 0.1):
        weight = freezing_weight(case, config, beta)
        print(f"DPO with beta {beta:g}: W stays the identity from penalty_weight {weight:.3f} on.")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
