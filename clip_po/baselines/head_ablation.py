"""Attention heads that read words, found and silenced without training (Dyslexify)."""

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

from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import class_embeddings, classify
from clip_po.policy import evaluating

Head = tuple[int, int]
"""Layer and head of the vision tower, both counted from 0."""


@dataclass(frozen=True)
class HeadTrial:
    """What silencing one more head did to the validation images.

    Attributes:
        head: The head that was tried; None for the model as it was.
        score: Its reading score; nan for the model as it was.
        clean_accuracy: Accuracy with it and the heads kept before it silenced, 0..1.
        typographic_accuracy: The same on the typographic images.
        kept: Whether it stays silent.
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
        model: A copy of the model, its heads silenced by the function that was given.
        heads: The silenced heads, in the order in which they were chosen.
        trials: The validation curve: the model as it was, then each head that was tried.
    """

    model: CLIPModel
    heads: list[Head]
    trials: list[HeadTrial]


def reading_scores(
    model: CLIPModel, images: RobustnessImages, max_items: int | None = 500, batch_size: int = 64
) -> Tensor:
    """How much more the class token attends to the written word than to the rest of the image, by head.

    A head's score is the share of the class token's attention to patches that falls on patches with ink or
    sticker, averaged over typographic images, divided by the average share of such patches: 1 where the head does
    not care for words. The patches are those in which the typographic image differs from the clean one.

    Args:
        model: The model.
        images: Typographic images with their clean ones.
        max_items: Use the first so many items; None for all. Their pixels are held in memory, 1.2 MB an item at
            224 pixels.
        batch_size: Images a forward.

    Returns:
        Tensor[L, H], float32, on the CPU: by layer and head of the vision tower.

    Raises:
        TypeError: `model` is no plain CLIPModel.
        ValueError: No word can be seen on any image.

    Source: Hufe et al. 2025, arXiv 2508.20570, the typographic attention score. There words stand in the same rows
    of patches on all images; here they stand anywhere, so each image has patches of its own, and dividing by their
    share, the same for all heads, gives the score a scale without changing the ranking.
    """
    _check(model)
    clean, typographic, _ = _pixels(images, max_items)
    return _scores(model, clean, typographic, batch_size)


def silence_class_token(model: CLIPModel, heads: Sequence[Head]) -> CLIPModel:
    """A copy of a model in which attention heads of the vision tower add nothing to the class token.

    The patches keep what the heads bring them. No weights can say this, so it is done by hooks: `save_pretrained`
    writes the model as it was. Keep the heads, and call this again after loading; or see `silence_heads`.

    Args:
        model: The model; it stays as it is.
        heads: Layer and head of each, counted from 0.

    Returns:
        The copy.

    Raises:
        TypeError: `model` is no plain CLIPModel.
        ValueError: The model has no such head.

    Source: Hufe et al. 2025, arXiv 2508.20570, the ablation of a circuit of heads.
    """
    silenced = copy.deepcopy(model)
    for projection, columns in _outputs(silenced, heads):
        projection.register_forward_pre_hook(functools.partial(_without_class_token, columns))
    return silenced


def silence_heads(model: CLIPModel, heads: Sequence[Head]) -> CLIPModel:
    """A copy of a model in which attention heads of the vision tower add nothing to any token.

    The columns of the attention's output projection that read a head are set to 0, so that the copy is a plain
    CLIPModel, which saves and loads with transformers alone.

    Args:
        model: The model; it stays as it is.
        heads: Layer and head of each, counted from 0.

    Returns:
        The copy.

    Raises:
        TypeError: `model` is no plain CLIPModel.
        ValueError: The model has no such head.

    Source: no paper's; it is to `silence_class_token` what weights can say. Weights are the same for all tokens, so
    the patches lose the heads as well. In the last layer, of which only the class token is read, the two are the
    same; in earlier ones this one costs more clean accuracy, and so fewer heads can be silenced.
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
    """Silence the heads that read, the highest reading score first, as far as clean accuracy allows.

    Heads are scored once and tried in the order of their scores. A head stays silent where that raises
    typographic accuracy by `min_gain` and leaves clean accuracy within `max_clean_loss` of that of the model as it
    was. The search ends after `patience` heads in a row that did not stay silent, or at `max_heads`.

    Args:
        model: The model; it stays as it is.
        images: Validation images, none of those that the result is measured on.
        templates: Prompts with one `{}`, as for `class_embeddings`.
        max_clean_loss: Most clean accuracy that may be lost, in percentage points, >= 0.
        silence: `silence_class_token`, as in the paper, or `silence_heads` for a model that can be saved.
        min_gain: Least typographic accuracy that a head must bring, in percentage points.
        patience: Heads in a row that may be tried in vain, >= 1.
        max_heads: Most heads to silence; None for no limit.
        first_layer: Layer at which the candidates begin, counted from 0; None for the later half of the tower.
        max_items: Use the first so many items; None for all. Their pixels are held in memory, 1.2 MB an item at
            224 pixels.
        batch_size: Images a forward.

    Returns:
        The ablated model, its heads and the validation curve.

    Raises:
        TypeError: `model` is no plain CLIPModel.
        ValueError: An argument is out of range, or as for `reading_scores` and `class_embeddings`.

    Source: Hufe et al. 2025, arXiv 2508.20570, the greedy selection, with the bounds of its authors' code (a loss
    of 1 point, a gain of .1, ten heads). Theirs ends with the first head that breaks the bound on clean accuracy,
    and keeps it; here such a head is passed over, so that the bound holds and later heads have their turn. Theirs
    tries heads of all layers, as `first_layer=0` does.
    """
    _check(model)
    layers = model.config.vision_config.num_hidden_layers
    first_layer = layers // 2 if first_layer is None else first_layer
    if not 0 <= first_layer < layers:
        raise ValueError(f"first_layer must be a layer of the vision tower, 0 to {layers - 1}, got {first_layer!r}.")
    if max_clean_loss < 0:
        raise ValueError(f"max_clean_loss is a loss in percentage points >= 0, got {max_clean_loss!r}.")
    if patience < 1:
        raise ValueError(f"patience is a number of heads >= 1, got {patience!r}; the authors' is 10.")
    clean, typographic, label = _pixels(images, max_items)
    count = len(label)
    text_embeds = class_embeddings(model, images.processor, images.class_names, templates)

    def ask(candidate: CLIPModel) -> tuple[int, int]:
        clean_right, right = (
            _right(candidate, pixels, label, text_embeds, batch_size) for pixels in (clean, typographic)
        )
        return clean_right, right

    scores = _scores(model, clean, typographic, batch_size)
    candidates = [(layer, head) for layer in range(first_layer, layers) for head in range(scores.shape[1])]
    candidates.sort(key=lambda place: scores[place].item(), reverse=True)
    base_clean, best = ask(model)
    trials = [HeadTrial(None, math.nan, base_clean / count, best / count, kept=False)]
    heads: list[Head] = []
    vain = 0
    for place in candidates:
        if vain == patience or len(heads) == max_heads:
            break
        clean_right, right = ask(silence(model, [*heads, place]))
        # In counts, so that a loss of just the bound is not above it by a rounding error.
        kept = 100 * (right - best) >= min_gain * count and 100 * (base_clean - clean_right) <= max_clean_loss * count
        trials.append(HeadTrial(place, scores[place].item(), clean_right / count, right / count, kept))
        vain = 0 if kept else vain + 1
        if kept:
            heads.append(place)
            best = right
    return HeadAblation(silence(model, heads), heads, trials)


def _outputs(model: CLIPModel, heads: Sequence[Head]) -> Iterator[tuple[nn.Linear, slice]]:
    """The output projection that reads each head, and which of its columns do."""
    _check(model)
    config = model.config.vision_config
    width = config.hidden_size // config.num_attention_heads
    for layer, head in heads:
        if not (0 <= layer < config.num_hidden_layers and 0 <= head < config.num_attention_heads):
            raise ValueError(
                f"heads: ({layer}, {head}) is no head of a vision tower of {config.num_hidden_layers} layers of "
                f"{config.num_attention_heads} heads; give (layer, head), both counted from 0."
            )
        yield model.vision_model.encoder.layers[layer].self_attn.out_proj, slice(head * width, (head + 1) * width)


def _without_class_token(columns: slice, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tokens = inputs[0].clone()
    tokens[:, 0, columns] = 0
    return (tokens, *inputs[1:])


def _check(model: CLIPModel) -> None:
    # LoRA layers around an output projection would go on adding what its own weights no longer do.
    if not isinstance(model, CLIPModel):
        raise TypeError(
            f"model must be a plain transformers.CLIPModel, got {type(model).__name__}. Merge adapters first: "
            "model = model.merge_and_unload()."
        )


def _pixels(images: RobustnessImages, max_items: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and typographic pixels Tensor[N, 3, H, W] of the first items, and their labels Tensor[N]."""
    count = len(images) if max_items is None else min(max_items, len(images))
    if count < 1:
        raise ValueError(f"No items to look at: there are {len(images)} images, and max_items is {max_items!r}.")
    items = [images[index] for index in range(count)]
    clean, typographic = (torch.stack([item[name] for item in items]) for name in ("clean", "typographic"))
    return clean, typographic, torch.tensor([item["label"] for item in items])


def _scores(model: CLIPModel, clean: Tensor, typographic: Tensor, batch_size: int) -> Tensor:
    changed = (clean != typographic).any(dim=1, keepdim=True).float()
    written = F.max_pool2d(changed, model.config.vision_config.patch_size).flatten(1)
    seen = written.any(dim=1)
    if not seen.any():
        raise ValueError(
            "No word can be seen on any image: the processor's crop may leave it out. Set the attack's places to "
            "'center' to find out."
        )
    written, typographic = written[seen], typographic[seen]
    implementation = model.config.vision_config._attn_implementation
    shares = []
    # The default attention never holds its weights.
    model.vision_model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            for pixels, word in zip(typographic.split(batch_size), written.split(batch_size), strict=True):
                outputs = model.vision_model(pixels.to(model.device, model.dtype), output_attentions=True)
                attention = torch.stack([layer[:, :, 0, 1:].float().cpu() for layer in outputs.attentions])
                # A head may look at the class token alone.
                looked = attention.sum(-1).clamp(min=torch.finfo(attention.dtype).tiny)
                shares.append((attention * word[:, None]).sum(-1) / looked)
    finally:
        model.vision_model.set_attn_implementation(implementation)
    return torch.cat(shares, dim=1).mean(dim=1) / written.mean()


def _right(model: CLIPModel, pixels: Tensor, label: Tensor, text_embeds: Tensor, batch_size: int) -> int:
    with evaluating(model):
        answers = [classify(model, batch, text_embeds).argmax(dim=1).cpu() for batch in pixels.split(batch_size)]
    return int((torch.cat(answers) == label).sum())
