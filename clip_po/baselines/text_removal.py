"""Text removal: detect text in an image and fill it in before the model sees the image. Needs the extra `ocr`.

Source: the detector is Liao et al. 2020, arXiv 1911.08947 (differentiable binarization). The filling is Telea 2004, An
image inpainting technique based on the fast marching method.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers import ProcessorMixin

Polygon = tuple[tuple[float, float], ...]
"""Corners (x, y), in pixels of the image."""


@functools.cache
def _detector(min_score: float, growth: float) -> Any:
    """Return the detector, one per process. It runs on one thread, because data loader workers share the cores."""
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
            # The image is already resized for the detector.
            "Det.limit_side_len": 32,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


@dataclass(frozen=True)
class TextRemoval:
    """Fills in detected text from its surroundings. The rest of the image does not change.

    Text is detected but not read, so text in any language is removed, including harmless text. The detector is the
    detector of PP-OCR. Its weights are part of the package rapidocr, and nothing is downloaded. The same image gives
    the same result.

    Args:
        min_side: Smallest short side of the copy that the detector sees, in pixels, >= 32. The detector misses
            letters of a few pixels.
        max_side: Largest long side of this copy, in pixels, >= `min_side`. It limits the time.
        min_score: Score above which an area is text, in (0, 1].
        max_share: Largest share of the image that one text may cover, in (0, 1]. In small images the detector can
            mistake an object that fills the image for a letter.
        growth: Factor by which a detected core of text is enlarged, > 0. PP-OCR uses 1.6, which leaves a margin
            around the letters for reading. The area to fill in should not be larger than the ink.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If the extra `ocr` is not installed when the first image is processed.

    Source: not from a paper; the standard remedy. Detector: Liao et al. 2020, arXiv 1911.08947. Filling: Telea 2004.
    """

    min_side: int = 128
    max_side: int = 640
    min_score: float = 0.5
    max_share: float = 0.6
    growth: float = 1.2

    def __post_init__(self) -> None:
        """Check every argument before the first image."""
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(
                f"min_side and max_side must be numbers of pixels with 32 <= min_side <= max_side, got "
                f"{self.min_side!r} and {self.max_side!r}."
            )
        for name in ("min_score", "max_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)!r}.")
        if self.growth <= 0:
            raise ValueError(f"growth must be above 0, got {self.growth!r}; 1.2 is usual.")

    def find(self, image: Image.Image) -> list[Polygon]:
        """Find the text in an image.

        Args:
            image: Any PIL image.

        Returns:
            The four corners of each text, clockwise from the top left.

        Raises:
            ImportError: If the extra `ocr` is not installed.
        """
        scale = max(1.0, self.min_side / min(image.size))
        scale = min(scale, self.max_side / max(image.size))
        size = [max(32, round(side * scale)) for side in image.size]
        resized = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        # OpenCV expects the channels in the order blue, green, red.
        boxes = _detector(self.min_score, self.growth)(np.asarray(resized)[:, :, ::-1].copy()).boxes
        if boxes is None:
            return []
        corners = boxes / np.array(size) * np.array(image.size)
        polygons = [tuple((float(x), float(y)) for x, y in polygon) for polygon in corners]
        largest = self.max_share * image.width * image.height
        return [polygon for polygon in polygons if _area(polygon) <= largest]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Remove the text from an image.

        Args:
            image: Any PIL image.

        Returns:
            The image itself if it has no text, else an RGB copy of the same size.

        Raises:
            ImportError: If the extra `ocr` is not installed.
        """
        polygons = self.find(image)
        if not polygons:
            return image
        import cv2

        mask = Image.new("L", image.size)
        for polygon in polygons:
            ImageDraw.Draw(mask).polygon(polygon, fill=255)
        return Image.fromarray(cv2.inpaint(np.asarray(image.convert("RGB")), np.asarray(mask), 3, cv2.INPAINT_TELEA))


def processor_without_text(processor: ProcessorMixin, removal: TextRemoval) -> ProcessorMixin:
    """Return a copy of a processor that removes the text from images before processing them.

    The copy can replace the processor anywhere, and it can be pickled for the workers of a data loader.
    `save_pretrained` writes the original processor.

    Args:
        processor: The processor of the model.
        removal: The text removal.

    Returns:
        The copy. It tokenizes texts as before.
    """
    changed = copy.copy(processor)
    changed.image_processor = _WithoutText(processor.image_processor, removal)
    return changed


class _WithoutText:
    """An image processor that removes text first. All other attributes, such as sizes, are unchanged."""

    def __init__(self, image_processor: Any, removal: TextRemoval) -> None:
        self._image_processor, self._removal = image_processor, removal

    def __call__(self, images: Image.Image | Sequence[Image.Image], **kwargs: Any) -> Any:
        pictures = [images] if isinstance(images, Image.Image) else images
        return self._image_processor([self._removal(picture) for picture in pictures], **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Unpickling looks up attributes before any are set.
        if name == "_image_processor":
            raise AttributeError(name)
        return getattr(self._image_processor, name)


def _area(polygon: Polygon) -> float:
    """Return the area in square pixels, by the shoelace formula."""
    following = (*polygon[1:], polygon[0])
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(polygon, following, strict=True))) / 2
