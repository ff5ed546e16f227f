"""Image processors as open_clip's `preprocess_cfg`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Resampling
from transformers import CLIPImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

_INTERPOLATIONS: Mapping[str, Resampling] = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}

_STEPS = ("do_resize", "do_rescale", "do_normalize")


def image_processor(preprocess_cfg: Mapping[str, Any], image_size: int) -> CLIPImageProcessorPil:
    """Build the image processor that makes the pixels of open_clip's inference transform.

    Args:
        preprocess_cfg: open_clip's preprocessing. What it does not name has open_clip's default: OpenAI's mean and
            standard deviation, bicubic, the shortest side resized and the center cropped.
        image_size: Side of the images that the vision tower reads, in pixels.

    Returns:
        The image processor.

    Raises:
        ValueError: If there is none. The message names the key.
    """
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"open_clip's preprocess_cfg has resize_mode={mode!r}, which CLIP's image processor can't do: it resizes "
            "the shortest side or the whole image. Use this checkpoint with open_clip itself."
        )
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    if interpolation == "random":  # in training only
        interpolation = "bicubic"
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"open_clip's preprocess_cfg has interpolation={interpolation!r}, but it must be one of "
            f"{[*_INTERPOLATIONS, 'random']}. Correct the configuration."
        )
    square = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size} if mode == "shortest" else square,
        do_center_crop=mode == "shortest",
        crop_size=square,
        resample=_INTERPOLATIONS[interpolation],
        image_mean=list(preprocess_cfg.get("mean") or OPENAI_CLIP_MEAN),
        image_std=list(preprocess_cfg.get("std") or OPENAI_CLIP_STD),
    )


def preprocess_cfg(processor: Any, image_size: int) -> dict[str, Any]:
    """Describe an image processor as open_clip does.

    Args:
        processor: The image processor of a CLIPProcessor.
        image_size: Side of the images that the vision tower reads, in pixels.

    Returns:
        open_clip's preprocessing.

    Raises:
        ValueError: If open_clip has no such preprocessing. The message names the field.
    """
    square = {"height": image_size, "width": image_size}
    crop = dict(processor.crop_size or {}) if processor.do_center_crop else None
    modes = {"shortest": ({"shortest_edge": image_size}, square), "squash": (square, None)}
    size = {name: side for name, side in dict(processor.size).items() if side is not None}
    mode = next((name for name, sizes in modes.items() if sizes == (size, crop)), None)
    filters = {int(number): name for name, number in _INTERPOLATIONS.items()}
    off = [step for step in _STEPS if not getattr(processor, step)]
    if mode is None or off or int(processor.resample) not in filters:
        raise ValueError(
            f"The image processor has size={size}, crop_size={crop}, resample={processor.resample!r}"
            f"{''.join(f', {step}=False' for step in off)}, which open_clip's preprocessing can't express for images "
            f"of {image_size} pixels. Correct its preprocessor_config.json or processor_config.json."
        )
    return {
        "mode": "RGB",
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "interpolation": filters[int(processor.resample)],
        "resize_mode": mode,
    }
