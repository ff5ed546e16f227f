"""The two-tower models of transformers that are supported, each behind the interface of `DualEncoder`.

A family is a subclass of `DualEncoder` that says where its model differs. Nothing else in the package asks for the
class of a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clip_po.data.patches import COLUMNS, unpack_patches

Tower = Literal["vision", "text"]

PolicyKind = Literal["softmax", "sigmoid"]

HIGHEST_ENDS = 2
"""`eos_token_id` of old CLIP configs, for which transformers takes the highest token id as the end of a text."""

HIGHEST_ID = -1
"""`DualEncoder.end` of a text tower for which the highest token id is the end of a text."""

LINEAR_LAYERS = (
    r"(q_proj|k_proj|v_proj|o_proj|(?<!head\.attention\.)out_proj|output_proj|fc1|fc2|gate_proj|up_proj|down_proj"
    r"|query|key|value|(?<!pooler\.)dense)"
)
"""Names of the linear layers of attention and MLPs.

torch's MultiheadAttention, in the pooling head of SigLIP, reads the weight of its `out_proj` itself: an adapter there
would have no effect.
"""


class DualEncoder:
    """A two-tower model with the interface of all of them.

    This class fits towers with projections and a `logit_scale`, whose text embedding depends on all tokens.

    Args:
        model: The model of transformers itself, without a wrapper.

    Attributes:
        class_name: Name of the class in transformers.
        towers: Names of the modules of each tower, by tower.
        unused: Names of modules and parameters that no embedding depends on.
        scales: Names of the parameters that multiply or divide cosines.
        biases: Names of the parameters that are added to them.
        linear_layers: By tower, a regular expression for the names of its linear layers, which LoRA adapts by default.
        text_inputs: What the text tower reads of a tokenizer's output.
        padding: How a tokenizer pads the texts of a batch.
        largest_scale: Upper bound of a trained scale.
        pairwise: Whether the model is trained by a sigmoid of each pair instead of a softmax over pairs.
    """

    class_name: ClassVar[str]
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {
        "vision": ("vision_model", "visual_projection"),
        "text": ("text_model", "text_projection"),
    }
    unused: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ("logit_scale",)
    biases: ClassVar[tuple[str, ...]] = ()
    linear_layers: ClassVar[Mapping[Tower, str]] = {"vision": LINEAR_LAYERS, "text": LINEAR_LAYERS}
    text_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    padding: ClassVar[Literal["longest", "max_length"]] = "longest"
    largest_scale: ClassVar[float] = 100.0  # Radford et al. 2021, arXiv 2103.00020, Sec. 2.5
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
            Tensor[B, D] of images and Tensor[M, D] of texts, of any length.
        """
        return outputs.image_embeds, outputs.text_embeds

    @property
    def dim(self) -> int:
        """D, the size of an embedding."""
        return self.model.config.projection_dim

    def width(self, tower: Tower) -> int:
        """Return the size of the hidden states of a tower.

        Args:
            tower: "vision" or "text".

        Returns:
            The size.
        """
        return getattr(self.model.config, f"{tower}_config").hidden_size

    def adapter_targets(self, tower: Tower) -> str:
        """Return an example of layers for adapters.

        Args:
            tower: "vision" or "text".

        Returns:
            A regular expression for the end of their names: queries and values as in the LoRA paper, or the
            `linear_layers` of a tower whose attention has other names.
        """
        usual = r"(q_proj|v_proj)"
        names = (name for part in self.towers[tower] for name, _ in self.model.get_submodule(part).named_modules())
        return usual if any(re.search(usual, name) for name in names) else self.linear_layers[tower]

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
        """Bound a scale that trains, because a larger one makes the same cosines more certain without end."""
        if self.model.logit_scale.requires_grad:
            self.model.logit_scale.clamp_(max=math.log(self.largest_scale))

    # ---- What the towers read --------------------------------------------------------------------------------

    @property
    def token_limit(self) -> int:
        """The largest number of tokens that the text tower reads."""
        positions = self.model.config.text_config.max_position_embeddings
        # RoBERTa and its relatives count positions from the id of the padding on, whose embedding is not used.
        modules = self.model.text_model.named_modules()
        tables = (table for name, table in modules if name.endswith("position_embeddings"))
        padding = getattr(next(tables, None), "padding_idx", None)
        return positions if padding is None else positions - padding - 1

    @property
    def end(self) -> int | None:
        """The id of the token whose embedding is that of the text; None if all tokens count.

        `HIGHEST_ID` stands for the highest id of each text.
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


class _Pooled(DualEncoder):
    """Models that return projected features, before they are normalized, as the output of their towers."""

    def features_of(self, outputs: Any) -> tuple[Tensor, Tensor]:
        return outputs.vision_model_output.pooler_output, outputs.text_model_output.pooler_output


class _EndsText(DualEncoder):
    """Models whose embedding of a text is that of its first end-of-text token."""

    @property
    def end(self) -> int | None:
        return self.model.text_model.eos_token_id


class _CLIP(_Pooled, _EndsText):
    class_name = "CLIPModel"

    # Names that recorded runs and adapters hold.
    linear_layers = dict.fromkeys(("vision", "text"), r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)")

    @property
    def end(self) -> int | None:
        return HIGHEST_ID if super().end == HIGHEST_ENDS else super().end


class _MetaClip2(_Pooled, _EndsText):
    class_name = "MetaClip2Model"


class _ChineseCLIP(_Pooled):
    class_name = "ChineseCLIPModel"


class _AltCLIP(DualEncoder):
    class_name = "AltCLIPModel"


class _VisionTextDualEncoder(DualEncoder):
    class_name = "VisionTextDualEncoderModel"
    unused = ("vision_model.embeddings.mask_token",)  # of DINOv2, and of some ViTs


class _Temperature(DualEncoder):
    """Models that divide cosines by a temperature."""

    scales = ("temperature",)

    @property
    def scale(self) -> Tensor:
        return 1 / _at_least_float32(self.model.temperature)

    @torch.no_grad()
    def bound_scale(self) -> None:
        if self.model.temperature.requires_grad:
            self.model.temperature.clamp_(min=1 / self.largest_scale)


class _Align(_Temperature):
    """A convolutional vision tower without a projection, for images of any size."""

    class_name = "AlignModel"
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {
        "vision": ("vision_model",),
        "text": ("text_model", "text_projection"),
    }
    unused = ("text_model.pooler",)
    linear_layers: ClassVar[Mapping[Tower, str]] = {  # convolutions of one pixel, linear in the channels
        "vision": r"(expand_conv|project_conv|reduce|expand)",
        "text": LINEAR_LAYERS,
    }

    def width(self, tower: Tower) -> int:
        return self.model.config.vision_config.hidden_dim if tower == "vision" else super().width(tower)

    @property
    def image_side(self) -> int | None:
        return None


class _Tipsv2(_Pooled, _Temperature):
    class_name = "Tipsv2Model"
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {"vision": ("vision_model",), "text": ("text_model",)}
    unused = ("vision_model.embeddings.mask_token",)
    padding = "max_length"
    largest_scale = 1000.0  # that of published checkpoints is 200

    @property
    def dim(self) -> int:
        return self.model.config.vision_config.hidden_size


class _Siglip(_Pooled):
    """A sigmoid of each pair, with a bias. Texts are padded to the full length and read without an attention mask."""

    class_name = "SiglipModel"
    towers: ClassVar[Mapping[Tower, tuple[str, ...]]] = {"vision": ("vision_model",), "text": ("text_model",)}
    biases = ("logit_bias",)
    text_inputs = ("input_ids",)
    padding = "max_length"
    largest_scale = math.inf  # that of published checkpoints is above CLIP's bound
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


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


FAMILIES: Mapping[str, type[DualEncoder]] = {
    "clip": _CLIP,
    "siglip": _Siglip,
    "siglip2": _Siglip2,
    "metaclip_2": _MetaClip2,
    "altclip": _AltCLIP,
    "chinese_clip": _ChineseCLIP,
    "align": _Align,
    "vision-text-dual-encoder": _VisionTextDualEncoder,
    "tipsv2": _Tipsv2,
}
"""The supported models by `model_type`."""
