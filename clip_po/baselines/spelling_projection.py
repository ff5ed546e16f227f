"""Forget to spell: a learned orthogonal projection of both towers' embeddings to fewer dimensions.

The projection keeps what finds the image and the class of an image with a word on it. The towers stay frozen.

Source: Materzynska et al. 2022, Disentangling visual and written concepts in CLIP, arXiv 2206.07835. The
projection and its penalty are those of `clip_po.concept.transform`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from clip_po.baselines.frozen_towers import encode_drawings, epoch_batches
from clip_po.concept.transform import ConceptTransform
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.encoding import encode_texts
from clip_po.validation import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, check_number


def contrastive_loss(first: Tensor, second: Tensor, group: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy of cosines between the pairs of a batch.

    Args:
        first: Tensor[B, K], unit-norm.
        second: Tensor[B, K], unit-norm. Row i belongs to row i of `first`.
        group: Tensor[B], int64, on any device. Rows of one group are pairs too, with equal shares of the target.

    Returns:
        Tensor[], mean over the rows and both directions, in nats.

    Source: Materzynska et al. 2022, arXiv 2206.07835. Cosines are not scaled, as in the code of the authors. The code
    has no groups: it counts other rows of the same class as wrong.
    """
    same = (group[:, None] == group).to(first)
    target = same / same.sum(dim=1, keepdim=True)
    cosines = first @ second.T
    return (F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)) / 2


def learn_spelling_projection(
    model: CLIPModel,
    processor: Any,
    preferences: TypographicPreferences,
    *,
    output_dim: int | None = None,
    steps: int = 4000,
    drawings: int = 1,
    batch_size: int = 128,
    learning_rate: float = 1e-4,
    penalty_weight: float = 0.5,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> ConceptTransform:
    """Learn a projection that forgets to spell.

    The loss of a batch is the sum of three contrastive losses (clean images with their classes, typographic images
    with the classes, typographic with clean images) and `penalty_weight` times ||I - W W^T||_F. Images are encoded
    once, so training multiplies matrices only. `fold_into` of the result makes a plain CLIPModel with embeddings of
    `output_dim` numbers.

    Args:
        model: The model. It is not changed.
        processor: Its processor.
        preferences: Labelled images with a typographic attack.
        output_dim: K, the dimension that embeddings are projected to, 1..D; None for half of D.
        steps: Number of batches to train on, >= 0. 0 gives the random start.
        drawings: Number of epochs of the attack to encode, >= 1. Training cycles through them, one per pass.
        batch_size: Number of images per step, >= 1.
        learning_rate: Learning rate of Adam. It is halved every 4,000 steps.
        penalty_weight: Weight of the penalty, >= 0.
        seed: Seed of the start and of the order of the images.
        disable_tqdm: Whether to hide progress bars.

    Returns:
        The projection, with one W for both towers, on the device of the model.

    Raises:
        TypeError: If a number has the wrong type; also as in `clip_po.dual_encoder.dual_encoder`.
        ValueError: If an argument is out of range.

    Source: Materzynska et al. 2022, arXiv 2206.07835: the losses of the visual concepts in Fig. 4, with the optimizer,
    batch size and start of the authors' code. Their code also has three losses of the written words, with weights for
    which it names no values.
    """
    check_number("steps", steps, COUNT_OR_NONE)
    check_number("drawings", drawings, COUNT)
    check_number("batch_size", batch_size, COUNT)
    check_number("penalty_weight", penalty_weight, NOT_NEGATIVE)
    encoder = dual_encoder(model)
    dim = as_dual_encoder(encoder).dim
    concept = ConceptTransform(dim, dim // 2 if output_dim is None else output_dim, start="orthogonal", seed=seed)
    concept.to(encoder.device)
    prompts = encode_texts(encoder, processor, preferences.candidate_texts)
    labels = torch.tensor(preferences.labels, device=encoder.device)
    clean, typographic = encode_drawings(encoder, processor, preferences, drawings, disable_tqdm)
    optimizer = torch.optim.Adam(concept.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4000, gamma=0.5)
    batches = epoch_batches(len(preferences), batch_size, torch.Generator().manual_seed(seed))
    for epoch, rows in itertools.islice(batches, steps):
        images = torch.cat([clean[rows], typographic[epoch % drawings][rows]])
        projected, texts = concept(images, prompts[labels[rows]])
        ordinary, attacked = projected.chunk(2)
        seeing = contrastive_loss(ordinary, texts, labels[rows]) + contrastive_loss(attacked, texts, labels[rows])
        loss = seeing + contrastive_loss(attacked, ordinary, rows) + penalty_weight * concept.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return concept.requires_grad_(False)
