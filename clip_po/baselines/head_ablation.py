"""Dyslexify: find the attention heads that read words and silence them, without training.

Source: Hufe et al. 2025, arXiv 2508.20570: the typographic attention score, the ablation of a circuit of heads, and
the greedy selection of the circuit.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from clip_po.encoding import evaluating
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import class_embeddings, classify
from clip_po.validation import COUNT, check_number

Head = tuple[int, int]
"""Layer and head of the vision tower, both starting at 0."""


@dataclass(frozen=True)
class HeadTrial:
    """Validation accuracies after silencing one more head.

    Attributes:
        head: The head; None for the original model.
        score: Its reading score; NaN for the original model.
        clean_accuracy: Accuracy on clean images with this head and all previously kept heads silenced, 0..1.
        typographic_accuracy: The same on typographic images, 0..1.
        kept: Whether the head stays silenced.
    """

    head: Head | None
    score: float
    clean_accuracy: float
    typographic_accuracy: float
    kept: bool


@dataclass(frozen=True)
class HeadAblation:
    """A model with its reading heads silenced.

    Attributes:
        model: A copy of the model with the heads silenced.
        heads: The silenced heads, in the order of their selection.
        trials: The validation curve: the original model, then every head that was tried.
    """

    model: CLIPModel
    heads: list[Head]
    trials: list[HeadTrial]


def reading_scores(
    model: CLIPModel, images: RobustnessImages, max_items: int | None = 500, batch_size: int = 64
) -> Tensor:
    """Score how strongly the class token attends to the written word, by attention head.

    Patches with ink or sticker are the patches in which the typographic image differs from the clean one. The score of
    a head is the share of the class token's attention that falls on these patches, averaged over typographic images
    and divided by the average share of these patches. A head that ignores words scores 1.

    Args:
        model: The model.
        images: Pairs of typographic and clean images.
        max_items: Number of items to use, from the first; None for all. Their pixels are held in memory, 1.2 MB per
            item at 224 pixels.
        batch_size: Number of images in a forward pass.

    Returns:
        Tensor[L, H], float32, on the CPU: scores by layer and head of the vision tower.

    Raises:
        TypeError: If `model` is not a plain CLIPModel.
        ValueError: If there are no items, or no word is visible on any image.

    Source: Hufe et al. 2025, arXiv 2508.20570, the typographic attention score. In the paper words are in the same
    rows of patches on all images. Here they can be anywhere, so each image has its own patches. Dividing by their
    share, which is the same for all heads, scales the score without changing the ranking.
    """
    _check(model)
    clean, typographic, _ = _pixels(images, max_items)
    return _scores(model, clean, typographic, batch_size)


def silence_class_token(model: CLIPModel, heads: Sequence[Head]) -> CLIPModel:
    """Return a copy of a model in which attention heads of the vision tower add nothing to the class token.

    The heads still contribute to the patches. Weights cannot express this, so the copy uses hooks, and
    `save_pretrained` writes the original model. Store the heads and call this function again after loading, or use
    `silence_heads`.

    Args:
        model: The model. It is not changed.
        heads: Layer and head of each, starting at 0.

    Returns:
        The copy.

    Raises:
        TypeError: If `model` is not a plain CLIPModel.
        ValueError: If the model has no such head.

    Source: Hufe et al. 2025, arXiv 2508.20570, the ablation of a circuit of heads.
    """
    silenced = copy.deepcopy(model)
    for projection, columns in _outputs(silenced, heads):
        projection.register_forward_pre_hook(functools.partial(_without_class_token, columns))
    return silenced


def silence_heads(model: CLIPModel, heads: Sequence[Head]) -> CLIPModel:
    """Return a copy of a model in which attention heads of the vision tower add nothing to any token.

    The columns of the output projection that read the heads are set to 0. The copy is a plain CLIPModel, which
    transformers can save and load.

    Args:
        model: The model. It is not changed.
        heads: Layer and head of each, starting at 0.

    Returns:
        The copy.

    Raises:
        TypeError: If `model` is not a plain CLIPModel.
        ValueError: If the model has no such head.

    Source: not from a paper. This is the closest approximation of `silence_class_token` by weights. Weights apply to
    all tokens, so the patches lose the heads too. Both functions agree in the last layer, of which only the class
    token is used. In earlier layers this one costs more clean accuracy, so fewer heads can be silenced.
    """
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for projection, columns in _outputs(silenced, heads):
            projection.weight[:, columns] = 0
    return silenced


def ablate_reading_heads(
    model: CLIPModel,
    images: RobustnessImages,
    templates: Sequence[str],
    max_clean_loss: float = 1.0,
    *,
    silence: Callable[[CLIPModel, Sequence[Head]], CLIPModel] = silence_class_token,
    min_gain: float = 0.1,
    patience: int = 10,
    max_heads: int | None = None,
    first_layer: int | None = None,
    max_items: int | None = 500,
    batch_size: int = 64,
) -> HeadAblation:
    """Silence the heads with the highest reading scores, within a bound on the loss of clean accuracy.

    Heads are scored once and tried in descending order of their scores. A head stays silenced if this raises
    typographic accuracy by at least `min_gain` and keeps the total loss of clean accuracy within `max_clean_loss`.
    The search ends after `patience` consecutive heads that were not kept, or at `max_heads`.

    Args:
        model: The model. It is not changed.
        images: Validation images. Use other images to measure the result.
        templates: Prompts with one `{}`, as in `class_embeddings`.
        max_clean_loss: Largest loss of clean accuracy, in percentage points, >= 0.
        silence: `silence_class_token`, as in the paper, or `silence_heads` for a model that can be saved.
        min_gain: Smallest gain of typographic accuracy per head, in percentage points.
        patience: Number of consecutive heads to try without keeping one, >= 1.
        max_heads: Largest number of heads to silence; None for no limit.
        first_layer: First layer to take heads from, starting at 0; None for the later half of the tower.
        max_items: As in `reading_scores`.
        batch_size: Number of images in a forward pass.

    Returns:
        The ablated model, its heads and the validation curve.

    Raises:
        TypeError: If `model` is not a plain CLIPModel, or `patience` is not a whole number.
        ValueError: If an argument is out of range; also as in `reading_scores` and `class_embeddings`.

    Source: Hufe et al. 2025, arXiv 2508.20570, the greedy selection, with the bounds of the authors' code (a loss of 1
    point, a gain of .1, ten heads). Their search keeps the first head that exceeds the bound on clean accuracy and
    ends there. Here such a head is skipped, so that the bound holds and later heads can be tried. Their search covers
    all layers, as `first_layer=0` does.
    """
    _check(model)
    layers = model.config.vision_config.num_hidden_layers
    first_layer = layers // 2 if first_layer is None else first_layer
    if not 0 <= first_layer < layers:
        raise ValueError(f"first_layer must be a layer of the vision tower, 0 to {layers - 1}, got {first_layer!r}.")
    if max_clean_loss < 0:
        raise ValueError(f"max_clean_loss must be a loss in percentage points >= 0, got {max_clean_loss!r}.")
    check_number("patience", patience, COUNT, "The authors use 10.")
    clean, typographic, label = _pixels(images, max_items)
    count = len(label)
    text_embeds = class_embeddings(model, images.processor, images.class_names, templates)

    def count_right(candidate: CLIPModel) -> tuple[int, int]:
        clean_right, right = (
            _right(candidate, pixels, label, text_embeds, batch_size) for pixels in (clean, typographic)
        )
        return clean_right, right

    scores = _scores(model, clean, typographic, batch_size)
    candidates = [(layer, head) for layer in range(first_layer, layers) for head in range(scores.shape[1])]
    candidates.sort(key=lambda place: scores[place].item(), reverse=True)
    base_clean, best = count_right(model)
    trials = [HeadTrial(None, math.nan, base_clean / count, best / count, kept=False)]
    heads: list[Head] = []
    failures = 0
    for place in candidates:
        if failures == patience or len(heads) == max_heads:
            break
        clean_right, right = count_right(silence(model, [*heads, place]))
        # Compare counts, so that a loss equal to the bound does not exceed it by a rounding error.
        kept = 100 * (right - best) >= min_gain * count and 100 * (base_clean - clean_right) <= max_clean_loss * count
        trials.append(HeadTrial(place, scores[place].item(), clean_right / count, right / count, kept))
        failures = 0 if kept else failures + 1
        if kept:
            heads.append(place)
            best = right
    return HeadAblation(silence(model, heads), heads, trials)


def _outputs(model: CLIPModel, heads: Sequence[Head]) -> Iterator[tuple[nn.Linear, slice]]:
    """Yield, for each head, the output projection that reads it and the columns that do."""
    _check(model)
    config = model.config.vision_config
    width = config.hidden_size // config.num_attention_heads
    for layer, head in heads:
        if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
            raise ValueError(
                f"heads: ({layer}, {head}) is not a head of a vision tower with {config.num_hidden_layers} layers of "
                f"{config.num_attention_heads} heads. Pass (layer, head), both starting at 0."
            )
        yield model.vision_model.encoder.layers[layer].self_attn.out_proj, slice(head * width, (head + 1) * width)


def _without_class_token(columns: slice, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tokens = inputs[0].clone()
    tokens[:, 0, columns] = 0
    return (tokens, *inputs[1:])


def _check(model: CLIPModel) -> None:
    # A LoRA layer around an output projection would still add the contribution of a silenced head.
    if not isinstance(model, CLIPModel):
        raise TypeError(
            f"model must be a plain transformers.CLIPModel, got {type(model).__name__}. Merge adapters first: "
            "model = model.merge_and_unload(). The attention of other two-tower models is not read."
        )


def _pixels(images: RobustnessImages, max_items: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return clean and typographic pixels Tensor[N, 3, H, W] of the first items, and their labels Tensor[N]."""
    count = len(images) if max_items is None else min(max_items, len(images))
    if count < 1:
        raise ValueError(f"There are no items to score: {len(images)} images, and max_items is {max_items!r}.")
    items = [images[index] for index in range(count)]
    clean, typographic = (torch.stack([item[name] for item in items]) for name in ("clean", "typographic"))
    return clean, typographic, torch.tensor([item["label"] for item in items])


def _scores(model: CLIPModel, clean: Tensor, typographic: Tensor, batch_size: int) -> Tensor:
    changed = (clean != typographic).any(dim=1, keepdim=True).float()
    written = F.max_pool2d(changed, model.config.vision_config.patch_size).flatten(1)
    seen = written.any(dim=1)
    if not seen.any():
        raise ValueError(
            "No word is visible on any image. The crop of the processor may cut it off: set the places of the attack "
            "to 'center' to find out."
        )
    written, typographic = written[seen], typographic[seen]
    implementation = model.config.vision_config._attn_implementation
    shares = []
    # The default attention implementation does not return attention weights.
    model.vision_model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            for pixels, word in zip(typographic.split(batch_size), written.split(batch_size), strict=True):
                outputs = model.vision_model(pixels.to(model.device, model.dtype), output_attentions=True)
                attention = torch.stack([layer[:, :, 0, 1:].float().cpu() for layer in outputs.attentions])
                # A head may attend to the class token only, so this sum can be 0.
                total = attention.sum(-1).clamp(min=torch.finfo(attention.dtype).tiny)
                shares.append((attention * word[:, None]).sum(-1) / total)
    finally:
        model.vision_model.set_attn_implementation(implementation)
    return torch.cat(shares, dim=1).mean(dim=1) / written.mean()


def _right(model: CLIPModel, pixels: Tensor, label: Tensor, text_embeds: Tensor, batch_size: int) -> int:
    with evaluating(model):
        answers = [classify(model, batch, text_embeds).argmax(dim=1).cpu() for batch in pixels.split(batch_size)]
    return int((torch.cat(answers) == label).sum())
