"""One interface to the two-tower models of transformers: embeddings, logits, towers, and what the towers read.

`FAMILIES` lists the supported classes. A class is supported by a subclass of `DualEncoder` that says where it differs
from CLIP; nothing else in the package asks for the class of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from clip_po.data.patches import COLUMNS, unpack_patches
from clip_po.other_kinds import model_remedy

Tower = Literal["vision", "text"]

HIGHEST_ENDS = 2
"""`eos_token_id` of old CLIP configs, for which transformers takes the highest token id as the end of a text."""

LARGEST_SCALE = 100.0
"""Upper bound of a trained scale of the cosines. Source: Radford et al. 2021, arXiv 2103.00020, Sec. 2.5."""

ANSWERS = ("forward", "get_image_features", "get_text_features", "__call__")
"""Methods of a model that define its answers. Embeddings are computed by these methods or by the towers in them."""

LINEAR_LAYERS = (
    r"(q_proj|k_proj|v_proj|o_proj|(?<!head\.attention\.)out_proj|fc1|fc2|query|key|value|(?<!pooler\.)dense)"
)
"""Names of the linear layers of attention and MLPs.

torch's MultiheadAttention, in the pooling head of SigLIP, reads the weight of its `out_proj` itself: an adapter there
would have no effect.
"""


class DualEncoder:
    """A two-tower model with the interface of all of them. This class is that of CLIP and its close relatives.

    Args:
        model: The model of transformers itself, without a wrapper.

    Attributes:
        class_name: Name of the class in transformers.
        towers: Names of the modules of each tower, by tower.
        unused: Modules whose output no embedding depends on.
        scales: Names of the parameters that turn cosines into logits.
        linear_layers: By tower, a regular expression for the names of its linear layers, which LoRA adapts by default.
        text_inputs: What the text tower reads of a tokenizer's output.
        padding: How a tokenizer pads the texts of a batch.
        pairwise: Whether the model is trained by a sigmoid of each pair instead of a softmax over pairs.
    """

    class_name: ClassVar[str] = "CLIPModel"
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {
        "vision": ("vision_model", "visual_projection"),
        "text": ("text_model", "text_projection"),
    }
    unused: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ("logit_scale",)
    linear_layers: ClassVar[Mapping[Tower, str]] = {"vision": LINEAR_LAYERS, "text": LINEAR_LAYERS}
    text_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    padding: ClassVar[Literal["longest", "max_length"]] = "longest"
    pairwise: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model

    # ---- Embeddings ------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Embed images outside of a training step, which needs `inputs` and one call of the model instead.

        Args:
            pixel_values: Tensor[B, ...] of `clip_po.data.images.to_pixels`.

        Returns:
            Tensor[B, D], not normalized.
        """
        return self.model.get_image_features(**self.image_inputs(pixel_values)).pooler_output

    def text_features(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Embed texts outside of a training step.

        Args:
            tokens: The `text_inputs`, Tensor[M, L] each.

        Returns:
            Tensor[M, D], not normalized.
        """
        return self.model.get_text_features(**tokens).pooler_output

    def inputs(self, pixel_values: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the keyword arguments of a call of the model.

        Args:
            pixel_values: As for `image_features`.
            tokens: As for `text_features`.

        Returns:
            The arguments.
        """
        return {**tokens, **self.image_inputs(pixel_values)}

    def image_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the vision tower.

        Args:
            pixel_values: As for `image_features`.

        Returns:
            The arguments.
        """
        return {"pixel_values": pixel_values}

    def features_of(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Return the embeddings in the output of a call of the model.

        Args:
            outputs: The output. Gradients go through it, as DDP and FSDP need.

        Returns:
            Tensor[B, D] of images and Tensor[M, D] of texts. Their length means nothing.
        """
        return outputs.vision_model_output.pooler_output, outputs.text_model_output.pooler_output

    @property
    def dim(self) -> int:
        """D, the size of an embedding."""
        return self.model.config.projection_dim

    # ---- Logits ----------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines, Tensor[], > 0, at least float32, with its gradient."""
        return _at_least_float32(self.model.logit_scale).exp()

    @property
    def bias(self) -> Tensor | None:
        """What is added to scaled cosines, Tensor[], with its gradient; None for a model without."""
        return None

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the logits of all pairs: scale * cos(image, text) + bias.

        Args:
            image_embeds: Tensor[B, D], unit-norm.
            text_embeds: Tensor[M, D], unit-norm.

        Returns:
            Tensor[B, M], with gradients.
        """
        return self._biased(self.scale * image_embeds @ text_embeds.T)

    def pair_logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the logit of each image and the text at its position.

        Args:
            image_embeds: Tensor[P, D], unit-norm.
            text_embeds: Tensor[P, D], unit-norm.

        Returns:
            Tensor[P], with gradients.
        """
        return self._biased(self.scale * (image_embeds * text_embeds).sum(dim=-1))

    def _biased(self, scaled: Tensor) -> Tensor:
        return scaled if self.bias is None else scaled + self.bias

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Bound a trained scale as CLIP does, because a larger one makes the same cosines more certain without end."""
        if self.model.logit_scale.requires_grad:
            self.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))

    # ---- What the towers read --------------------------------------------------------------------------------

    @property
    def token_limit(self) -> int:
        """The largest number of tokens that the text tower reads."""
        table = getattr(getattr(self.model.text_model, "embeddings", None), "position_embeddings", None)
        # In RoBERTa and its relatives, positions are counted from the id of the padding on.
        padding = getattr(table, "padding_idx", None)
        positions = self.model.config.text_config.max_position_embeddings
        return positions if padding is None else positions - padding - 1

    @property
    def end(self) -> int | None:
        """The id of the token whose embedding is that of the text; None if all tokens count.

        `HIGHEST_ENDS` stands for the highest id of each text.
        """
        return None

    @property
    def image_side(self) -> int | None:
        """Height and width of the images that the vision tower reads, in pixels; None if it reads several sizes."""
        side = getattr(self.model.config.vision_config, "image_size", None)
        return side if isinstance(side, int) else None

    def random_inputs(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw two images and a text, to see whether two models give the same embeddings.

        Args:
            generator: On the CPU.

        Returns:
            As for `inputs`, on the device of the model.
        """
        text = self.model.config.text_config
        ends = [getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")]
        tokens = torch.tensor([[ends[0] or 0, 2, 3, ends[1] or 0]]).clamp(max=text.vocab_size - 1)
        pixels = self.random_pixels(generator)
        return pixels.to(self.model.device, self.model.dtype), {"input_ids": tokens.to(self.model.device)}

    def random_pixels(self, generator: torch.Generator) -> Tensor:
        """Draw the pixel values of two images.

        Args:
            generator: On the CPU.

        Returns:
            Tensor[2, ...], on the CPU.
        """
        channels, side = getattr(self.model.config.vision_config, "num_channels", 3), self.image_side or 64
        return torch.randn((2, channels, side, side), generator=generator)


class _CLIP(DualEncoder):
    """CLIP's embedding of a text is that of its end-of-text token."""

    # Names that recorded runs and adapters hold.
    linear_layers = dict.fromkeys(("vision", "text"), r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)")

    @property
    def end(self) -> int | None:
        return self.model.text_model.eos_token_id


class _Siglip(DualEncoder):
    """A sigmoid of each pair, with a bias. Texts are padded to the full length and read without an attention mask."""

    class_name = "SiglipModel"
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {"vision": ("vision_model",), "text": ("text_model",)}
    scales = ("logit_scale", "logit_bias")
    text_inputs = ("input_ids",)
    padding = "max_length"
    pairwise = True

    @property
    def dim(self) -> int:
        return self.model.config.vision_config.hidden_size

    @property
    def scale(self) -> Tensor:
        return super().scale.reshape(())

    @property
    def bias(self) -> Tensor | None:
        return _at_least_float32(self.model.logit_bias).reshape(())

    def bound_scale(self) -> None:
        """Leave the scale as it is: that of published checkpoints is above CLIP's bound."""


class _Siglip2(_Siglip):
    """SigLIP with images of any aspect ratio (NaFlex), as patches that `clip_po.data.patches` packs."""

    class_name = "Siglip2Model"

    @property
    def image_side(self) -> int | None:
        return None

    def image_inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return unpack_patches(pixel_values)

    def random_pixels(self, generator: torch.Generator) -> Tensor:
        vision = self.model.config.vision_config
        side = math.isqrt(vision.num_patches)
        size = vision.num_channels * vision.patch_size**2
        packed = torch.randn((2, side**2, size + COLUMNS), generator=generator)
        packed[..., size:] = torch.tensor([1.0, side, side])
        return packed


FAMILIES: Mapping[str, type[DualEncoder]] = {
    "clip": _CLIP,
    "siglip": _Siglip,
    "siglip2": _Siglip2,
}
"""The supported models by `model_type`."""

_BY_CLASS = {family.class_name: family for family in FAMILIES.values()}


def dual_encoder(model: nn.Module, name: str = "model") -> PreTrainedModel:
    """Return the two-tower model of transformers inside a plain model or a PeftModel. Its LoRA layers stay active.

    Args:
        model: The model.
        name: Name of the argument, for messages.

    Returns:
        The model itself, or the base model of a `PeftModel`: no copy.

    Raises:
        TypeError: If the model is of no class in `FAMILIES`, or of a subclass that overrides a method in `ANSWERS`.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    supported = _supported_class(inner)
    if supported is None:
        raise TypeError(
            f"{name} must be a transformers.CLIPModel or another two-tower model of transformers (or a "
            f"PeftModel around one), got {type(inner).__name__}. {model_remedy(inner)}"
        )
    own = [method for method in ANSWERS if getattr(type(inner), method) is not getattr(supported, method)]
    if own:
        kind, base = type(inner).__name__, supported.__name__
        raise TypeError(
            f"{name} is a {kind}, whose own {', '.join(f'{kind}.{method}' for method in own)} would be ignored: "
            f"embeddings are computed as {base} computes them. Load the weights with {base}.from_pretrained, or "
            "put the change into a module of the model, such as model.vision_model."
        )
    return inner


def as_dual_encoder(model: nn.Module, name: str = "model") -> DualEncoder:
    """Return the interface to a two-tower model.

    Args:
        model: The model, or a PeftModel around it.
        name: Name of the argument, for messages.

    Returns:
        The interface. It holds the model, not a copy.

    Raises:
        TypeError: As for `dual_encoder`.
    """
    inner = dual_encoder(model, name)
    supported = _supported_class(inner)
    assert supported is not None  # dual_encoder has checked it
    return _BY_CLASS[supported.__name__](inner)


def _supported_class(model: Any) -> type | None:
    """Return the class in `FAMILIES` that a model belongs to; None if it belongs to none."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and kind.__name__ in _BY_CLASS:
            return kind
    return None


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
