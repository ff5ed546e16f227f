"""Images of a column in RGB; pixel values bit for bit those of the processor, by the fast path too."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from samples import make_scenes, picture, tiny_processor
from transformers import CLIPImageProcessorPil
from transformers.utils import logging

from clip_po.data.images import _processors_show_white, read_image, read_images, to_pixels, to_rgb
from clip_po.evaluation.zero_shot import zero_shot_accuracy


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


# ---- A column of a dataset


@pytest.fixture(scope="module")
def dataset():
    return make_scenes()


def test_an_unreadable_image_names_row_and_column(dataset, model, processor):
    rows = [{"path": None, "bytes": b"no image"} if row == 2 else image for row, image in enumerate(dataset["image"])]
    broken = datasets.Dataset.from_dict(
        {"image": rows[:4], "label": [0, 1, 2, 0]}, features=dataset.select_columns(["image", "label"]).features
    )
    assert read_image(read_images(broken, "image"), "image", 0).size == (28, 20)
    with pytest.raises(ValueError, match=r"Row 2: the image in column 'image' can't be read \(UnidentifiedImageError"):
        zero_shot_accuracy(model, processor, broken, ["a photo of a {}"], disable_tqdm=True)


def test_a_gap_and_a_path_are_no_images(dataset):
    gap = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="Row 0: column 'image' holds no image"):
        read_image(read_images(gap, "image"), "image", 0)
    paths = datasets.Dataset.from_dict({"image": ["a.png"]})
    with pytest.raises(ValueError, match=r"holds str, expected an image.*cast_column"):
        read_image(read_images(paths, "image"), "image", 0)


def test_images_are_rgb():
    grey = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (4, 4))]}, features=datasets.Features({"image": datasets.Image()})
    )
    assert read_image(read_images(grey, "image"), "image", 0).mode == "RGB"


# ---- The same pixels after deployment


def files_of_every_mode():
    """Files as people have them, by mode, with the pixels that a viewer shows."""
    base, noise = picture(3, 48), Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8))
    see_through, grey = base.convert("RGBA"), base.convert("LA")
    see_through.putalpha(noise)
    grey.putalpha(noise)
    for image in (
        *(base.convert(mode) for mode in ("L", "1", "P", "LA")),
        see_through,
        grey,
        see_through.quantize(64),
    ):
        yield image.mode, image, "png"
    yield "CMYK", base.convert("CMYK"), "jpeg"


@pytest.mark.parametrize(("mode", "image", "kind"), files_of_every_mode())
def test_training_and_the_plain_processor_read_the_same_pixels_or_it_is_said(processor, mode, image, kind, caplog):
    logging.get_logger("clip_po.data.images").warning_once.cache_clear()
    buffer = io.BytesIO()
    image.save(buffer, kind)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
    trained = to_pixels(
        processor, [read_image(read_images(rows.cast_column("image", datasets.Image()), "image"), "image", 0)]
    )
    plain = processor(images=Image.open(io.BytesIO(buffer.getvalue())), return_tensors="pt")["pixel_values"]
    if image.has_transparency_data and not _processors_show_white():
        assert "transparent pixels" in caplog.text
    else:
        assert torch.equal(trained, plain)


@pytest.mark.parametrize("returned", [lambda image: image, np.asarray])
def test_the_look_at_transparent_pixels_fits_what_transformers_returns(returned, monkeypatch, caplog):
    for colour, white in (("white", True), ("red", False)):
        shown = Image.new("RGB", (1, 1), colour)
        monkeypatch.setattr("clip_po.data.images.convert_to_rgb", lambda image, shown=shown: returned(shown))
        assert _processors_show_white.__wrapped__() == white
    monkeypatch.undo()
    logging.get_logger("transformers.image_transforms").warning_once.cache_clear()
    _processors_show_white.__wrapped__()
    assert "deprecated" not in caplog.text


@pytest.mark.parametrize("values", [np.uint16, np.int32])
def test_where_the_plain_processor_would_clip_a_warning_says_so(values, caplog):
    logging.get_logger("clip_po.data.images").warning_once.cache_clear()
    to_rgb(Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(values)))
    assert "clip them at 255" in caplog.text
    assert "clip_po.data.to_rgb" in caplog.text
