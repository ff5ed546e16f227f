"""Scores of images and texts under a checkpoint: the cosines of their embeddings, and the logits of the policy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from clip_po.data.images import to_pixels, to_rgb
from clip_po.dual_encoder import as_dual_encoder, dual_encoder
from clip_po.encoding import CachedTextEmbeddings, encode_images, encode_texts_autocast, evaluating
from clip_po.models import check_processor, load_any, read_processor
from clip_po.validation import COUNT, check_number


class Scorer:
    """A checkpoint that embeds images and texts, in batches, without gradients and without dropout.

    Args:
        checkpoint: Folder or Hub id of a model or of adapters, in safetensors.
        device: Device of the model; None for the accelerator if there is one, else the CPU.
        batch_size: Images in a forward pass, >= 1.
        precision: Precision of the towers, such as torch.bfloat16; None for float32. Scores are float32.

    Raises:
        ValueError, TypeError, OSError: As for `clip_po.models.load_any`, `read_processor` and `check_processor`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        precision: torch.dtype | None = None,
    ) -> None:
        check_number("batch_size", batch_size, COUNT)
        name = os.fspath(checkpoint)
        self.model = load_any(name).requires_grad_(False)
        self.processor = read_processor(name)
        check_processor(self.processor, self.model)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model.to(device or found or "cpu")
        self.batch_size, self.precision = batch_size, precision
        self._known_texts = CachedTextEmbeddings(self.model, self.processor, encode_texts_autocast)

    def pixels(self, image: Image.Image) -> Tensor:
        """Prepare an image for the model. Threads may call this method at the same time.

        Args:
            image: Image of any mode.

        Returns:
            Tensor[C, H, W].
        """
        return to_pixels(self.processor, [to_rgb(image)])[0]

    def embed_pixels(self, pixels: Sequence[Tensor]) -> Tensor:
        """Embed prepared images.

        Args:
            pixels: B tensors, as from `pixels`.

        Returns:
            Tensor[B, D], float32, unit-norm, on the device of the model.

        Raises:
            ValueError: If an embedding is not finite.
        """
        encoder = dual_encoder(self.model)
        parts = []
        with evaluating(self.model), self._in_precision():
            for start in range(0, len(pixels), self.batch_size):
                batch = torch.stack(list(pixels[start : start + self.batch_size]))
                parts.append(encode_images(self.model, batch.to(encoder.device, encoder.dtype)).float())
        embeds = torch.cat(parts)
        if not embeds.isfinite().all():
            raise ValueError(
                "Embeddings of images hold nan or infinity: the weights of the vision tower are not finite, or its "
                "activations overflow. Load an earlier checkpoint, or use float32."
            )
        return embeds

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed images.

        Args:
            images: B images of any mode, B >= 1.

        Returns:
            As for `embed_pixels`.

        Raises:
            ValueError: As for `embed_pixels`, or if an image can't be converted to RGB.
        """
        return self.embed_pixels([self.pixels(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts. Embeddings are kept, so that a text that comes again is not encoded again.

        Args:
            texts: M texts, at least one. Longer texts than the text tower reads are truncated.

        Returns:
            Tensor[M, D], float32, unit-norm, on the device of the model.

        Raises:
            ValueError: If an embedding is not finite.
        """
        with self._in_precision():
            return self._known_texts(texts).float()

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the logits of the model, such as logit_scale * cos(image, text).

        Args:
            image_embeds: Tensor[B, D], unit-norm.
            text_embeds: Tensor[M, D], unit-norm.

        Returns:
            Tensor[B, M], float32.
        """
        return as_dual_encoder(self.model).logits(image_embeds, text_embeds)

    def _in_precision(self) -> contextlib.AbstractContextManager[object]:
        device = dual_encoder(self.model).device.type
        return torch.autocast(device, self.precision, enabled=self.precision is not None)
