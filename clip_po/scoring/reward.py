"""A checkpoint as a reward: how well an image and a text belong together, for trainers that optimize a reward."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_po.data.images import to_rgb
from clip_po.scoring.scorer import Scorer


class RewardModel:
    """The reward of an image and a text: the cosine of their embeddings under a checkpoint, -1 to 1.

    The object is a reward function of TRL and of diffusion trainers:

    - TRL (`GRPOTrainer(reward_funcs=RewardModel(...))`) calls it by keywords with prompts, completions and the columns
      of the dataset. A completion is scored against the image of its row.
    - Trainers of diffusion models (DDPO and those after it) call it with images, prompts and metadata. An image is
      scored against its prompt.

    Weights are read from safetensors, stay in float32 without gradients, and do not change. Nothing is drawn at
    random: the same call returns the same rewards.

    Args:
        checkpoint: Folder or Hub id of a model or of adapters, as for `clip_po.models.load_any`.
        batch_size: Images in a forward pass, >= 1.
        device: Device of the model; None for the accelerator if there is one, else the CPU.
        image_column: Column with the image of a row, for TRL. None for `image`, or `images` with a list of one image.
            TRL gives columns of these two names to the language model too, which then must read images.

    Raises:
        ValueError, TypeError, OSError: As for `Scorer`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        image_column: str | None = None,
    ) -> None:
        self.image_columns = ("image", "images") if image_column is None else (image_column,)
        self.scorer = Scorer(checkpoint, batch_size=batch_size, device=device)
        # Trainers log rewards by the name of the function.
        self.__name__ = f"clip_reward_{os.path.basename(os.path.normpath(os.fspath(checkpoint)))}"

    @overload
    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]: ...

    @overload
    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[Tensor, dict[str, Any]]: ...

    def __call__(
        self,
        images: Any = None,
        prompts: Any = None,
        metadata: Any = None,
        *,
        completions: Any = None,
        **columns: Any,
    ) -> list[float] | tuple[Tensor, dict[str, Any]]:
        """Compute rewards in the form that the caller expects.

        Args:
            images: As for `of_images` or, with completions, the column of that name.
            prompts: As for `of_images`. Not used with completions.
            metadata: As for `of_images` or, with completions, the column of that name.
            completions: As for `of_completions`; None to score images.
            **columns: As for `of_completions`.

        Returns:
            With completions as `of_completions`, else as `of_images`.

        Raises:
            ValueError, TypeError: As for `of_completions` and `of_images`.
        """
        if completions is None:
            return self.of_images(images, prompts, metadata)
        return self.of_completions(completions, **({} if images is None else {"images": images}), **columns)

    def of_completions(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score the completions of a language model, such as captions, against the images of their rows.

        Args:
            completions: B texts, or conversations whose last message is the answer.
            **columns: Other columns of the rows. All but that of the images are ignored.

        Returns:
            B rewards.

        Raises:
            ValueError: If there is no column of images, a row has several images, or a completion has no text.
        """
        column = next((name for name in self.image_columns if columns.get(name) is not None), None)
        if column is None:
            raise ValueError(
                "The reward of a completion needs the image of its row, but the rows have only the columns "
                f"{sorted(columns)}. Keep the column {self.image_columns[0]!r} in train_dataset, or name another one "
                "with image_column."
            )
        return self.of_pairs(_single(columns[column], column), list(map(answer, completions))).tolist()

    def of_images(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Score the images of a diffusion model against their prompts.

        Args:
            images: B images: PIL, or Tensor[B, 3, H, W] or array [B, H, W, 3], of floats from 0 to 1 or of uint8.
            prompts: B texts.
            metadata: Not used. Trainers of diffusion models pass it.

        Returns:
            Tensor[B] of rewards on the CPU, and an empty dictionary for what else a reward function might tell.

        Raises:
            ValueError, TypeError: If lengths differ, or an image has another form.
        """
        return self.of_pairs(images_of(images), prompts), {}

    def of_pairs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Score each image against the text at its position.

        Args:
            images: B images of any mode, B >= 1.
            texts: B texts.

        Returns:
            Tensor[B], float32, on the CPU.

        Raises:
            ValueError: If lengths differ, there are none, or an embedding is not finite.
        """
        if len(images) != len(texts) or not len(texts):
            raise ValueError(f"Expected as many images as texts, at least one, got {len(images)} and {len(texts)}.")
        different = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        text_embeds = self.scorer.embed_texts(list(different))[[different[text] for text in texts]]
        return (self.scorer.embed_images(images) * text_embeds).sum(dim=-1).cpu()


def answer(completion: Any) -> str:
    """Return the text of a completion.

    Args:
        completion: A text, or a list of messages, each with a `content` of text or of parts with texts.

    Returns:
        The text, or that of the last message.

    Raises:
        ValueError: If there is no text.
    """
    content = completion
    if (
        isinstance(content, (list, tuple))
        and content
        and isinstance(content[-1], Mapping)
        and "content" in content[-1]
    ):
        content = content[-1]["content"]
    if isinstance(content, (list, tuple)):
        content = " ".join(part["text"] for part in content if isinstance(part, Mapping) and part.get("text"))
    if not isinstance(content, str):
        raise ValueError(f"A completion must be a text or a list of messages, got {completion!r}.")
    return content


def images_of(images: Sequence[Any] | Tensor | np.ndarray) -> list[Image.Image]:
    """Return images of any form as PIL images.

    Args:
        images: As for `RewardModel.of_images`.

    Returns:
        B RGB images.

    Raises:
        TypeError: If an image has another form.
        ValueError: If floats are not from 0 to 1.
    """
    return [_pil(image) for image in images]


def _pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    channels_last = image.detach().cpu().permute(1, 2, 0) if isinstance(image, Tensor) and image.ndim == 3 else image
    values = np.asarray(channels_last)
    if values.ndim != 3 or values.shape[-1] != 3:
        raise TypeError(
            f"An image must be a PIL image, a tensor [3, H, W] or an array [H, W, 3], got {type(image).__name__} of "
            f"shape {getattr(image, 'shape', None)}."
        )
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    low, high = float(values.min()), float(values.max())
    if not -1e-3 <= low <= high <= 1 + 1e-3:
        raise ValueError(
            f"Images of floats must be from 0 to 1, got {low:g} to {high:g}. Convert those of a diffusion model with "
            "(images / 2 + 0.5).clamp(0, 1)."
        )
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _single(images: Sequence[Any], column: str) -> list[Image.Image]:
    """Return the image of each row of a column that holds images or lists of one image."""
    lists = [list(image) if isinstance(image, (list, tuple)) else [image] for image in images]
    if several := next((len(own) for own in lists if len(own) != 1), None):
        raise ValueError(
            f"A row of column {column!r} has {several} images, but a reward compares one image with one text."
        )
    return images_of([own[0] for own in lists])
