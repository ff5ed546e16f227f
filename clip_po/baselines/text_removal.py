"""Text found in an image and filled in before the model sees it; needs the extra `ocr`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import CLIPProcessor

Polygon = tuple[tuple[float, float], ...]
"""Corners (x, y) in pixels of the image."""


@functools.cache
def _detector(min_score: float, growth: float) -> Any:
    """The detector, one per process, on one thread: a data loader's workers share the cores among themselves."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("Text removal needs a text detector: pip install 'clip_po[ocr]'.") from error
    return RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Global.log_level": "error",
            "Det.box_thresh": min_score,
            "Det.unclip_ratio": growth,
            # The image comes in the size at which it is to be looked at.
            "Det.limit_side_len": 32,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


@dataclass(frozen=True)
class TextRemoval:
    """Fills in what a text detector takes for text, from around it; the rest of the image stays bit for bit.

    Nothing is read: text in any language goes, harmless text too. The detector is that of PP-OCR, whose weights
    come with the package rapidocr: nothing is downloaded. The same image gives the same result.

    Args:
        min_side: The detector looks at a copy whose short side is at least that many pixels, as letters of a few
            pixels escape it.
        max_side: And whose long side is at most that many, which bounds the time.
        min_score: Score in (0, 1] above which an area is text.
        max_share: Largest share of the image that one text may cover, in (0, 1]: in small images an object that
            fills the picture is taken for a letter.
        growth: How far the core of a text that the detector finds is grown, > 0. PP-OCR's own 1.6 takes whole
            letters with room around them, to be read; what is to be filled in should be no larger than the ink.

    Raises:
        ValueError: An argument is out of range.
        ImportError: When the first image comes, where the extra is not installed.

    Source: no paper's, the usual remedy. The detector is a differentiable binarization, Liao et al. 2020, arXiv
    1911.08947; the filling that of Telea 2004, An image inpainting technique based on the fast marching method.
    """

    min_side: int = 128
    max_side: int = 640
    min_score: float = 0.5
    max_share: float = 0.6
    growth: float = 1.2

    def __post_init__(self) -> None:
        """Check every argument before the first image comes."""
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(
                f"min_side and max_side must be numbers of pixels, 32 <= min_side <= max_side, got {self.min_side!r} "
                f"and {self.max_side!r}."
            )
        for name in ("min_score", "max_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)!r}.")
        if self.growth <= 0:
            raise ValueError(f"growth must be above 0, got {self.growth!r}; 1.2 is usual.")

    def find(self, image: Image.Image) -> list[Polygon]:
        """Where there is text in an image.

        Args:
            image: Any PIL image.

        Returns:
            Four corners of each text, clockwise from its top left.
        """
        scale = max(1.0, self.min_side / min(image.size))
        scale = min(scale, self.max_side / max(image.size))
        size = [max(32, round(side * scale)) for side in image.size]
        looked_at = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        # As OpenCV has it: blue, green, red.
        boxes = _detector(self.min_score, self.growth)(np.asarray(looked_at)[:, :, ::-1].copy()).boxes
        if boxes is None:
            return []
        corners = boxes / np.array(size) * np.array(image.size)
        polygons = [tuple((float(x), float(y)) for x, y in polygon) for polygon in corners]
        largest = self.max_share * image.width * image.height
        return [polygon for polygon in polygons if _area(polygon) <= largest]

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image without its text.

        Args:
            image: Any PIL image.

        Returns:
            The image itself where it has no text, else a copy in RGB of the same size.
        """
        polygons = self.find(image)
        if not polygons:
            return image
        import cv2

        mask = Image.new("L", image.size)
        for polygon in polygons:
            ImageDraw.Draw(mask).polygon(polygon, fill=255)
        return Image.fromarray(cv2.inpaint(np.asarray(image.convert("RGB")), np.asarray(mask), 3, cv2.INPAINT_TELEA))


def processor_without_text(processor: CLIPProcessor, removal: TextRemoval) -> CLIPProcessor:
    """A copy of a processor that removes the text from images first; it serves wherever the processor does.

    It can be pickled, for the workers of a data loader. `save_pretrained` writes the processor as it was.

    Args:
        processor: The model's processor.
        removal: Removes the text.

    Returns:
        The copy; texts are tokenized as before.
    """
    changed = copy.copy(processor)
    changed.image_processor = _WithoutText(processor.image_processor, removal)
    return changed


class _WithoutText:
    """An image processor with removal before it; all else, its sizes for example, is the image processor's."""

    def __init__(self, image_processor: Any, removal: TextRemoval) -> None:
        self._image_processor, self._removal = image_processor, removal

    def __call__(self, images: Image.Image | Sequence[Image.Image], **kwargs: Any) -> Any:
        pictures = [images] if isinstance(images, Image.Image) else images
        return self._image_processor([self._removal(picture) for picture in pictures], **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there are any.
        if name == "_image_processor":
            raise AttributeError(name)
        return getattr(self._image_processor, name)


def _area(polygon: Polygon) -> float:
    """Area in square pixels, by the shoelace formula."""
    following = (*polygon[1:], polygon[0])
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(polygon, following, strict=True))) / 2
