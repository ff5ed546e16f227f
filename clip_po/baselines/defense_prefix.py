"""Defense-Prefix: one learned token before the class name, both towers frozen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPModel

from clip_po.data.images import to_pixels
from clip_po.data.typographic import TypographicPreferences
from clip_po.evaluation.zero_shot import class_embeddings
from clip_po.losses import kl_regularization
from clip_po.policy import candidate_logps, dual_encoder, encode_images, evaluating
from clip_po.validation import check_class_names

_IMAGES_A_FORWARD = 64


@dataclass(frozen=True)
class Prefix:
    """A learned token.

    Attributes:
        vector: Tensor[H], float32, on the CPU: its embedding, H being the hidden size of the text tower.
    """

    vector: Tensor

    def save(self, path: str | Path) -> None:
        """Write the token to a safetensors file."""
        save_file({"prefix": self.vector}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Prefix:
        """Read a token that `save` wrote.

        Raises:
            ValueError: The file holds no such token.
        """
        try:
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is no safetensors file ({error}), as Prefix.save writes one; no other kind is read."
            ) from error
        if "prefix" not in tensors:
            raise ValueError(f"{str(path)!r} holds {sorted(tensors)}, expected 'prefix', as Prefix.save writes it.")
        return cls(tensors["prefix"])


def learn_prefix(
    model: CLIPModel,
    processor: Any,
    preferences: TypographicPreferences,
    templates: Sequence[str] | None = None,
    *,
    steps: int = 2500,
    drawings: int = 1,
    batch_size: int = 512,
    learning_rate: float = 0.002,
    defense_weight: float = 1.0,
    identity_weight: float = 1.0,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Prefix:
    """Learn the token that makes prompts tell classes apart in spite of words on images.

    The loss of a batch is `defense_weight` times the cross-entropy of typographic images over the prompts with the
    token, plus `identity_weight` times KL(prompts without || prompts with the token) of the clean images over the
    classes. Each step takes one template at random. Images are encoded once, and training runs on their embeddings
    and the text tower alone.

    Args:
        model: The model; it stays as it is.
        processor: Its CLIPProcessor.
        preferences: Labelled images with the attack that writes on them.
        templates: Prompts with one `{}`; None for that of `preferences`.
        steps: Batches to train on, >= 0; 0 gives the token as it starts.
        drawings: How many of the attack's epochs are encoded, >= 1; they take turns, one each time through.
        batch_size: Images a step.
        learning_rate: Of the first step; it falls along a cosine to a fortieth of it.
        defense_weight: As above, >= 0.
        identity_weight: As above, >= 0.
        seed: Seed of the token as it starts, of the order of images and of the templates.
        disable_tqdm: Shows no progress bar.

    Returns:
        The token.

    Raises:
        ValueError: An argument is out of range, or as for `prefix_class_embeddings`.

    Source: Azuma and Matsui 2023, arXiv 2304.04512, the defense loss and the identity loss, with the settings of
    their code: a start at N(0, .02), SGD, and about as many steps as ten epochs of ImageNet-100 in batches of 512.
    """
    for name, value, least in (("steps", steps, 0), ("drawings", drawings, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}.")
    if min(defense_weight, identity_weight) < 0:
        raise ValueError(f"Weights must be >= 0, got defense_weight={defense_weight!r}, {identity_weight=}.")
    encoder = dual_encoder(model)
    templates = [preferences.template] if templates is None else list(templates)
    names = preferences.class_names
    prompts = [_Prompts(encoder, processor, names, template) for template in templates]
    labels = torch.tensor(preferences.labels, device=encoder.device)
    generator = torch.Generator().manual_seed(seed)
    vector = 0.02 * torch.randn(encoder.config.text_config.hidden_size, generator=generator)
    vector = vector.to(encoder.device).requires_grad_()
    optimizer = torch.optim.SGD([vector], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), learning_rate / 40)

    with evaluating(encoder):
        plain = [class_embeddings(encoder, processor, names, [template]) for template in templates]
        clean = _encode_images(encoder, processor, preferences, None, disable_tqdm)
        typographic = [
            _encode_images(encoder, processor, preferences, epoch, disable_tqdm) for epoch in range(drawings)
        ]
        scale = encoder.logit_scale.exp()
        batches = _batches(len(labels), batch_size, generator)
        for epoch, rows in itertools.islice(batches, steps):
            choice = int(torch.randint(len(templates), (), generator=generator))
            with torch.enable_grad():
                texts = prompts[choice].encode(vector)
                attacked = candidate_logps(typographic[epoch % drawings][rows], texts, scale)
                ordinary = candidate_logps(clean[rows], texts, scale)
                defense = F.nll_loss(attacked, labels[rows])
                identity = kl_regularization(candidate_logps(clean[rows], plain[choice], scale), ordinary).mean()
                loss = defense_weight * defense + identity_weight * identity
            # Of the token alone: the model's own gradients, where it has any, are someone else's.
            (vector.grad,) = torch.autograd.grad(loss, vector)
            optimizer.step()
            schedule.step()
    return Prefix(vector.detach().cpu())


def _batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Epoch and rows of batch after batch, without end, in a new order each time through."""
    for epoch in itertools.count():
        for batch in torch.randperm(rows, generator=generator).split(batch_size):
            yield epoch, batch


def prefix_class_embeddings(
    model: CLIPModel, processor: Any, prefix: Prefix, class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit-norm embedding per class whose prompts have the learned token before the name.

    Args:
        model: The model that the token was learned for.
        processor: Its CLIPProcessor.
        prefix: The token.
        class_names: C different names; others than those of training too.
        templates: Prompts with one `{}`, as for `clip_po.evaluation.zero_shot.class_embeddings`.

    Returns:
        Tensor[C, D], float32, unit-norm, on the model's device, without gradients.

    Raises:
        ValueError: Names are missing or repeated; a template has no or several `{}`; a token of another size.

    Source: Azuma and Matsui 2023, arXiv 2304.04512.
    """
    check_class_names(class_names)
    encoder = dual_encoder(model)
    size = encoder.config.text_config.hidden_size
    if prefix.vector.shape != (size,):
        raise ValueError(
            f"The prefix has the shape {tuple(prefix.vector.shape)}, but the model's tokens have {size} numbers: it "
            "was learned for another model. Learn one for this."
        )
    vector = prefix.vector.to(encoder.device)
    with evaluating(encoder):
        embeds = [_Prompts(encoder, processor, class_names, template).encode(vector) for template in templates]
    return F.normalize(torch.stack(embeds).mean(dim=0), dim=-1)


class _Prompts:
    """The prompts of all classes by one template, with a place for the token before each name.

    Args:
        encoder: The model.
        processor: Its CLIPProcessor.
        class_names: C names.
        template: A prompt with one `{}`.
    """

    def __init__(self, encoder: CLIPModel, processor: Any, class_names: Sequence[str], template: str) -> None:
        if template.count("{}") != 1:
            raise ValueError(
                f"Template {template!r} has {template.count('{}')} places for the class name; write exactly "
                'one {}, as in "a photo of a {}".'
            )
        tokenizer = processor.tokenizer
        before = tokenizer(template.split("{}")[0].strip())["input_ids"][:-1]  # without the end of the text
        longest = encoder.text_model.config.max_position_embeddings
        prompts = [template.replace("{}", name) for name in class_names]
        rows = tokenizer(prompts, truncation=True, max_length=longest - 1)["input_ids"]
        self.place = len(before)
        for row, prompt in zip(rows, prompts, strict=True):
            if row[: self.place] != before or len(row) < self.place + 2:
                raise ValueError(
                    f"The name in {prompt!r} does not begin with a token of its own within the {longest} tokens that "
                    "the model reads, so that no token can be put before it. Put a space before {} in the template, "
                    "or shorten it."
                )
        # Any token but the end of the text, by whose place the tower finds what it returns: its embedding is replaced.
        rows = [[*before, before[-1], *row[self.place :]] for row in rows]
        tokens = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(encoder.device)
        self.encoder = encoder
        self.tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def encode(self, vector: Tensor) -> Tensor:
        """Unit-norm embeddings Tensor[C, D], at least float32, differentiable by the token `vector` Tensor[H]."""

        def insert(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.place] = vector.to(output.dtype)
            return output

        hook = self.encoder.text_model.embeddings.token_embedding.register_forward_hook(insert)
        try:
            features = self.encoder.get_text_features(**self.tokens).pooler_output
        finally:
            hook.remove()
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _encode_images(
    encoder: CLIPModel, processor: Any, preferences: TypographicPreferences, epoch: int | None, disable_tqdm: bool
) -> Tensor:
    """Embeddings Tensor[N, D] of all images as drawn in an epoch; of the clean images where it is None."""
    embeds = []
    title = "Clean images" if epoch is None else f"Typographic images, drawing {epoch + 1}"
    starts = range(0, len(preferences), _IMAGES_A_FORWARD)
    for start in tqdm(starts, desc=title, disable=disable_tqdm):
        indices = range(start, min(start + _IMAGES_A_FORWARD, len(preferences)))
        images = [
            preferences.image("clean_image", i) if epoch is None else preferences.row(i, epoch)["image"]
            for i in indices
        ]
        embeds.append(encode_images(encoder, to_pixels(processor, images).to(encoder.device, encoder.dtype)))
    return torch.cat(embeds)
