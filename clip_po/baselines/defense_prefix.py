"""Defense-Prefix: one learned token before the class name, with both towers frozen.

Source: Azuma and Matsui 2023, arXiv 2304.04512: the defense loss and the identity loss on the token embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from clip_po.baselines.clip_layers import clip_model
from clip_po.baselines.frozen_towers import encode_drawings, epoch_batches
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import evaluating
from clip_po.evaluation.zero_shot import class_embeddings
from clip_po.losses import kl_regularization
from clip_po.policy import candidate_logps
from clip_po.validation import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, check_class_names, check_number, check_template


@dataclass(frozen=True)
class Prefix:
    """A learned token.

    Attributes:
        vector: Tensor[H], float32, on the CPU: the embedding of the token. H is the hidden size of the text tower.
    """

    vector: Tensor

    def save(self, path: str | Path) -> None:
        """Save the token to a safetensors file.

        Args:
            path: The file.
        """
        save_file({"prefix": self.vector}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Prefix:
        """Load a token that `save` wrote.

        Args:
            path: The file.

        Returns:
            The token.

        Raises:
            ValueError: If the file is not a safetensors file with such a token.
        """
        try:
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(
                f"{str(path)!r} is not a safetensors file ({error}). Pass a file written by Prefix.save."
            ) from error
        if "prefix" not in tensors:
            raise ValueError(
                f"{str(path)!r} holds {sorted(tensors)}, expected 'prefix'. Pass a file written by Prefix.save."
            )
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
    """Learn a token that makes prompts robust to words on images.

    The loss of a batch is `defense_weight` times the cross-entropy of the typographic images over the prompts with
    the token, plus `identity_weight` times KL(prompts without the token || prompts with the token) of the clean
    images over the classes. Each step uses one random template. Images are encoded once, so training runs the text
    tower only.

    Args:
        model: The model. It is not changed.
        processor: Its CLIPProcessor.
        preferences: Labelled images with a typographic attack.
        templates: Prompts with one `{}`; None for the template of `preferences`.
        steps: Number of batches to train on, >= 0. 0 gives the initial token.
        drawings: Number of epochs of the attack to encode, >= 1. Training cycles through them, one per pass.
        batch_size: Number of images per step, >= 1.
        learning_rate: Initial learning rate. It decays along a cosine to one fortieth.
        defense_weight: Weight of the defense loss, >= 0.
        identity_weight: Weight of the identity loss, >= 0.
        seed: Seed of the initial token, the order of the images and the choice of templates.
        disable_tqdm: Whether to hide progress bars.

    Returns:
        The token.

    Raises:
        TypeError: If a number has the wrong type; also as in `clip_po.baselines.clip_layers.clip_model`.
        ValueError: If an argument is out of range; also as in `prefix_class_embeddings`.

    Source: Azuma and Matsui 2023, arXiv 2304.04512, the defense loss and the identity loss, with the settings of
    their code: initialization from N(0, .02), SGD, and about as many steps as ten epochs of ImageNet-100 in batches
    of 512.
    """
    check_number("steps", steps, COUNT_OR_NONE)
    check_number("drawings", drawings, COUNT)
    check_number("batch_size", batch_size, COUNT)
    check_number("defense_weight", defense_weight, NOT_NEGATIVE)
    check_number("identity_weight", identity_weight, NOT_NEGATIVE)
    encoder = clip_model(model, "Defense-Prefix")
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
        clean, typographic = encode_drawings(encoder, processor, preferences, drawings, disable_tqdm)
        scale = encoder.logit_scale.exp()
        batches = epoch_batches(len(labels), batch_size, generator)
        for epoch, rows in itertools.islice(batches, steps):
            choice = int(torch.randint(len(templates), (), generator=generator))
            with torch.enable_grad():
                texts = prompts[choice].encode(vector)
                attacked = candidate_logps(typographic[epoch % drawings][rows], texts, scale)
                ordinary = candidate_logps(clean[rows], texts, scale)
                defense = F.nll_loss(attacked, labels[rows])
                identity = kl_regularization(candidate_logps(clean[rows], plain[choice], scale), ordinary).mean()
                loss = defense_weight * defense + identity_weight * identity
            # Differentiate the token only: backward() would also change gradients that belong to the caller.
            (vector.grad,) = torch.autograd.grad(loss, vector)
            optimizer.step()
            schedule.step()
    return Prefix(vector.detach().cpu())


def prefix_class_embeddings(
    model: CLIPModel, processor: Any, prefix: Prefix, class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Encode one embedding per class, from prompts with the learned token before the class name.

    Args:
        model: The model that the token was learned for.
        processor: Its CLIPProcessor.
        prefix: The token.
        class_names: C names. They may differ from the names in training.
        templates: Prompts with one `{}`, as in `clip_po.evaluation.zero_shot.class_embeddings`.

    Returns:
        Tensor[C, D], float32, unit-norm, on the device of the model, without gradients.

    Raises:
        TypeError: As in `clip_po.baselines.clip_layers.clip_model`.
        ValueError: If a name is missing, a template does not have exactly one `{}`, the token has
            another size, or a name does not begin with a token of its own.

    Source: Azuma and Matsui 2023, arXiv 2304.04512.
    """
    check_class_names(class_names)
    encoder = clip_model(model, "Defense-Prefix")
    size = encoder.config.text_config.hidden_size
    if prefix.vector.shape != (size,):
        raise ValueError(
            f"The prefix has shape {tuple(prefix.vector.shape)}, but token embeddings of the model have shape "
            f"({size},). It was learned for another model. Learn a prefix for this model."
        )
    vector = prefix.vector.to(encoder.device)
    with evaluating(encoder):
        embeds = [_Prompts(encoder, processor, class_names, template).encode(vector) for template in templates]
    return F.normalize(torch.stack(embeds).mean(dim=0), dim=-1)


class _Prompts:
    """The prompts of all classes in one template, with a position for the token before each name.

    Args:
        encoder: The model.
        processor: Its CLIPProcessor.
        class_names: C names.
        template: Prompt with one `{}`.
    """

    def __init__(self, encoder: CLIPModel, processor: Any, class_names: Sequence[str], template: str) -> None:
        check_template(template)
        tokenizer = processor.tokenizer
        before = tokenizer(template.split("{}")[0].strip())["input_ids"][:-1]  # Without the end-of-text token.
        longest = encoder.text_model.config.max_position_embeddings
        prompts = [template.replace("{}", name) for name in class_names]
        rows = tokenizer(prompts, truncation=True, max_length=longest - 1)["input_ids"]
        self.position = len(before)
        for row, prompt in zip(rows, prompts, strict=True):
            if row[: self.position] != before or len(row) < self.position + 2:
                raise ValueError(
                    f"The name in {prompt!r} does not begin with a token of its own within the {longest} tokens that "
                    "the model reads, so the prefix cannot go before it. Put a space before {} in the template, or "
                    "shorten it."
                )
        # A placeholder, whose embedding is replaced. It must not be the end-of-text token, at which the tower pools.
        rows = [[*before, before[-1], *row[self.position :]] for row in rows]
        tokens = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(encoder.device)
        self.encoder = encoder
        self.tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def encode(self, vector: Tensor) -> Tensor:
        """Encode the prompts with the token.

        Args:
            vector: Tensor[H], the embedding of the token.

        Returns:
            Tensor[C, D], unit-norm, float32 or wider, differentiable in `vector`.
        """

        def insert(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.position] = vector.to(output.dtype)
            return output

        hook = self.encoder.text_model.embeddings.token_embedding.register_forward_hook(insert)
        try:
            features = self.encoder.get_text_features(**self.tokens).pooler_output
        finally:
            hook.remove()
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
