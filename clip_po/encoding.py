"""Encoding images and texts as unit-norm embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.families import DualEncoder
from clip_po.text_identity import check_tokenizer


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode without gradients, and restore the mode of each module afterwards.

    Args:
        *models: Modules. Each of their submodules gets its own mode back, also if the block raises.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        # Not inference_mode: its tensors cannot be part of a later backward pass.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def encode_texts(model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Embed texts in evaluation mode and full precision, without gradients.

    Args:
        model: Two-tower model or PeftModel.
        processor: Processor of the model.
        texts: M texts, at least one. Longer texts than the text tower reads are truncated.
        batch_size: Texts in a forward pass.

    Returns:
        Tensor[M, D], unit-norm, at least float32, on the device of the model.

    Raises:
        ValueError: If `texts` is a single string or empty, an embedding is not finite, or as for `check_tokenizer`.
    """
    with torch.autocast(dual_encoder(model).device.type, enabled=False):
        return encode_texts_autocast(model, processor, texts, batch_size)


def encode_texts_autocast(
    model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Embed texts as `encode_texts` does, but in the precision of the autocast around the call.

    Args:
        model: As for `encode_texts`.
        processor: As for `encode_texts`.
        texts: As for `encode_texts`.
        batch_size: As for `encode_texts`.

    Returns:
        Tensor[M, D], unit-norm, at least float32, on the device of the model. Only the tower runs in the lower
        precision.

    Raises:
        ValueError: If `texts` is a single string or empty, or an embedding is not finite.
        TypeError: As for `clip_po.dual_encoder.dual_encoder`.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of at least one text, got {texts!r}.")
    encoder = as_dual_encoder(model)
    check_tokenizer(processor.tokenizer, model)
    embeds = []
    with evaluating(encoder.model):
        for start in range(0, len(texts), batch_size):
            tokens = tokenize(encoder, processor, texts[start : start + batch_size])
            embeds.append(F.normalize(_at_least_float32(encoder.text_features(tokens)), dim=-1))
    found = torch.cat(embeds)
    broken = (~found.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"The embeddings of {len(broken)} of {len(texts)} texts, such as {texts[broken[0]]!r}, hold nan or "
            "infinity: the weights of the text tower are not finite, or its activations overflow. Load an earlier "
            "checkpoint, or use float32."
        )
    return found


def encode_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Embed images outside training. The call takes no part in gradient synchronization.

    Args:
        model: Two-tower model or PeftModel.
        pixel_values: Tensor[B, C, H, W].

    Returns:
        Tensor[B, D], unit-norm, at least float32.
    """
    return F.normalize(_at_least_float32(as_dual_encoder(model).image_features(pixel_values)), dim=-1)


def tokenize(encoder: DualEncoder, processor: ProcessorMixin, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenize texts, padded to the longest of them or as the model was trained.

    Args:
        encoder: The model. A text with more tokens than its text tower reads is truncated.
        processor: Processor of the model.
        texts: M texts, at least one.

    Returns:
        `encoder.text_inputs`, Tensor[M, L] each, on the device of the model.
    """
    # A tokenizer may have no length limit, and a longer text has no position embeddings.
    tokens = processor.tokenizer(
        list(texts), padding=encoder.padding, truncation=True, max_length=encoder.token_limit, return_tensors="pt"
    ).to(encoder.model.device)
    return {name: tokens[name] for name in encoder.text_inputs}


MOST_TEXTS = 65_536
"""Number of embeddings that `CachedTextEmbeddings` keeps, so that a text of its own in every row fills no memory."""


class CachedTextEmbeddings:
    """Embeddings of texts under a frozen text tower. Each text is encoded once.

    Args:
        model: Model with a frozen text tower.
        processor: Processor of the model.
        encode: `encode_texts`, or `encode_texts_autocast`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        encode: Callable[[nn.Module, ProcessorMixin, Sequence[str]], Tensor] = encode_texts,
    ) -> None:
        self._encode = lambda texts: encode(model, processor, texts)
        self._known: dict[str, Tensor] = {}
        self._last: tuple[Sequence[str], Tensor] | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the unit-norm embeddings of texts, Tensor[M, D]."""
        if self._last is None or self._last[0] is not texts:
            if len(self._known) > MOST_TEXTS:
                self._known.clear()
            unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
            if unknown:
                self._known.update(zip(unknown, self._encode(unknown), strict=True))
            self._last = (texts, torch.stack([self._known[text] for text in texts]))
        return self._last[1]

    def forget(self) -> None:
        """Forget all embeddings, because the text tower has changed."""
        self._known.clear()
        self._last = None


def _at_least_float32(features: Tensor) -> Tensor:
    """Return features in float32, or in their own dtype if it is wider."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def unit_norm(features: Tensor) -> Tensor:
    """Normalize bit for bit as CLIPModel does, but never in half precision, which would round once more.

    Args:
        features: Tensor[..., D], in any floating-point dtype.

    Returns:
        Tensor[..., D], at least float32. A vector of zeros becomes NaN, as in CLIPModel.
    """
    features = _at_least_float32(features)
    return features / features.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
