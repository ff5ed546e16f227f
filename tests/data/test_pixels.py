"""Pixels are the processor's own, bit for bit, by the short way too."""

import numpy as np
import pytest
import torch
from PIL import Image
from samples import tiny_processor
from transformers import CLIPImageProcessorPil

from clip_po.data.images import to_pixels


class Mirrored(CLIPImageProcessorPil):
    """A processor of a user's own."""

    def resize(self, image, *args, **kwargs):
        return super().resize(image[..., ::-1], *args, **kwargs)


def noise(*size: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 24}},
        {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 24, "longest_edge": 60}},
        {"size": {"shortest_edge": 20}},  # smaller than what is cut out: padded
        {"do_center_crop": False, "size": {"height": 32, "width": 32}},
        {"do_resize": False},
    ],
)
@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, Mirrored])
def test_pixels_are_those_of_the_processor(kind, settings):
    given = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **settings}
    processor = tiny_processor()
    processor.image_processor = kind(**given)
    images = [noise(50, 33), noise(33, 50), noise(32, 32), noise(97, 41), noise(12, 9)]
    for some in (images, images[:1], [*images, noise(40, 40, mode="L")]):
        expected = processor.image_processor(some, return_tensors="pt")["pixel_values"]
        found = to_pixels(processor, some)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
