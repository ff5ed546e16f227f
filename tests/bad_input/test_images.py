"""Images that can't be read are named by row and column; unusual ones that can look as a viewer shows them."""

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from bad_input.table import case, check
from PIL import Image
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.embedding_cache import image_digest
from clip_po.data.formats import read_row
from clip_po.data.images import MOST_ELONGATED, read_image, read_images, to_pixels, to_rgb
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.zero_shot import zero_shot_accuracy

SIDE = 16


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def noise(side=SIDE):
    return Image.effect_noise((side, side), 90).convert("RGB")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header_of_a_bomb(side=20_000):
    """A PNG of a few bytes whose header asks for 400 million pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_png():
    data = bytearray(encoded(noise(), "PNG"))
    data[60] ^= 0xFF
    return bytes(data)


BROKEN = {
    "cut-jpeg": (lambda: encoded(noise(64), "JPEG")[:400], "runcated"),
    "cut-png": (lambda: encoded(noise(64), "PNG")[:900], "can't be read"),
    "damaged-png": (broken_png, "can't be read"),
    "cut-gif": (lambda: encoded(noise(64), "GIF")[:400], "can't be read"),
    "cut-tiff": (lambda: encoded(noise(), "TIFF")[:40], "can't be read"),
    "no-bytes": (lambda: b"", "UnidentifiedImageError"),
    "only-zeros": (lambda: bytes(500), "UnidentifiedImageError"),
    "text-named-jpg": (lambda: b"<html>404 not found</html>", "UnidentifiedImageError"),
    "bomb": (header_of_a_bomb, "DecompressionBombError"),
    "a-thread": (lambda: encoded(Image.new("L", (2 * MOST_ELONGATED + 1, 2)), "PNG"), "Crop the image"),
    "depth-of-no-scale": (
        lambda: encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"),
        "neither 0..1, 0..255 nor 0..65535",
    ),
}


def stored(data, folder):
    """A column of images: a good one, and the data as a file named .jpg."""
    file = folder / "it.jpg"
    file.write_bytes(data)
    good = {"bytes": encoded(picture(0), "PNG"), "path": None}
    columns = {"image": [good, {"path": str(file), "bytes": None}], "label": [0, 1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("name", BROKEN)
def test_every_reader_names_the_row_and_column_of_an_image_that_cannot_be_read(name, tmp_path, bench):
    make, says = BROKEN[name]
    rows = stored(make(), tmp_path)
    attack = TypographicAttack(words=CLASSES, min_side=32)
    readers = {
        "row 1": lambda b: read_row(rows, 1, "train_dataset"),
        "Row 1": lambda b: read_image(read_images(rows, "image"), "image", 1),
        "Row 1:": lambda b: TypographicPreferences(rows, attack)[1],
    }
    for where, reader in readers.items():
        with pytest.raises(ValueError) as error:
            reader(bench)
        message = str(error.value)
        assert [piece for piece in (where, "'image'", says, "Fix the file") if piece not in message] == [], message


def grey16():
    return Image.fromarray(np.linspace(0, 65_535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16))


def with_hole(mode):
    """A red image whose left half can't be seen, and hides black."""
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    return image.convert(mode)


def palette_with_hole():
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, SIDE // 2, SIDE))
    return encoded(image, "PNG", transparency=0)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(Image.new("RGB", (SIDE, 2 * SIDE), "red"), "JPEG", exif=exif)


def animated():
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue", "green")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


RED, WHITE, BLACK, GREY = (255, 0, 0), (255, 255, 255), (0, 0, 0), (128, 128, 128)
UNUSUAL = {
    # name: (bytes, colours of the upper left and lower right corner)
    "cmyk": (lambda: encoded(Image.new("RGB", (SIDE, SIDE), RED).convert("CMYK"), "JPEG"), RED, RED),
    "palette": (lambda: encoded(Image.new("RGB", (SIDE, SIDE), RED).quantize(2), "PNG"), RED, RED),
    "palette-with-hole": (palette_with_hole, WHITE, RED),
    "transparent": (lambda: encoded(with_hole("RGBA"), "PNG"), WHITE, RED),
    "grey-and-alpha": (lambda: encoded(with_hole("LA"), "PNG"), WHITE, (76, 76, 76)),
    "one-bit": (lambda: encoded(Image.new("1", (SIDE, SIDE), 1), "PNG"), WHITE, WHITE),
    "sixteen-bits": (lambda: encoded(grey16(), "PNG"), BLACK, WHITE),
    "sixteen-bits-tiff": (lambda: encoded(grey16(), "TIFF"), BLACK, WHITE),
    "thirty-two-bits": (lambda: encoded(Image.new("I", (SIDE, SIDE), 32_896), "TIFF"), GREY, GREY),
    "floats-to-one": (lambda: encoded(Image.new("F", (SIDE, SIDE), 0.5), "TIFF"), GREY, GREY),
    "floats-to-255": (lambda: encoded(Image.new("F", (SIDE, SIDE), 128.0), "TIFF"), GREY, GREY),
    "animated": (animated, RED, RED),
    "named-jpg-is-png": (lambda: encoded(Image.new("RGB", (SIDE, SIDE), RED), "PNG"), RED, RED),
    "turned-by-its-camera": (turned, RED, RED),
    "one-pixel": (lambda: encoded(Image.new("RGB", (1, 1), RED), "PNG"), RED, RED),
    "long": (lambda: encoded(Image.new("RGB", (MOST_ELONGATED, 1), RED), "PNG"), RED, RED),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_image_looks_as_a_viewer_shows_it(name, tmp_path, processor):
    make, *corners = UNUSUAL[name]
    rows = stored(make(), tmp_path)
    image = read_row(rows, 1, "train_dataset")["image"]
    for corner, place in zip(corners, ((0, 0), (image.width - 1, image.height - 1)), strict=True):
        np.testing.assert_allclose(image.getpixel(place), corner, atol=3)
    assert image == read_image(read_images(rows, "image"), "image", 1)
    if name == "turned-by-its-camera":
        assert image.size == (2 * SIDE, SIDE)
    assert to_pixels(processor, [image]).shape == (1, 3, 32, 32)
    assert TypographicAttack(words=CLASSES, min_side=32).draw(image, "dog", 0).mode == "RGB"


def test_greys_of_sixteen_bits_keep_their_steps():
    read = np.asarray(to_rgb(grey16()))[..., 0].flatten()
    np.testing.assert_array_equal(read, np.rint(np.linspace(0, 65_535, SIDE * SIDE).astype(np.uint16) / 257))
    assert len(set(read.tolist())) == 256


def test_an_image_in_rgb_is_given_back_as_it_is():
    image = noise()
    assert to_rgb(image) is image


def test_a_user_may_give_unusual_images_to_an_attack():
    attack = TypographicAttack(words=CLASSES, min_side=32, sticker=0.0)
    drawn = np.asarray(attack.draw(with_hole("RGBA"), "dog", 0))
    assert (drawn[:, 0] == 255).mean() > 0.5  # the hole is white, and not the black that it hides


def unreadable(column, data=b"no picture", rows=4):
    """Preferences of which row 2 can't be read."""
    table = make_preferences(rows)
    files = list(table.cast_column(column, datasets.Image(decode=False))[column])
    files[2] = {"bytes": data, "path": None}
    return table.remove_columns(column).add_column(column, files, feature=datasets.Image())


CASES = {
    "training": case(
        lambda b: b.trainer(unreadable("image"), precompute_ref_log_probs=False).train(),
        ValueError,
        "train_dataset row 2",
        "column 'image'",
        "drop the row",
    ),
    "clean-image-alone-is-named": case(
        lambda b: read_row(unreadable("clean_image"), 2, "rows"), ValueError, "column 'clean_image' can't"
    ),
    "no-image": case(
        lambda b: read_row(datasets.Dataset.from_dict({"image": [None]}), 0, "rows"),
        ValueError,
        "rows row 0: column 'image' holds no image",
        "Drop the row",
    ),
    "a-path-in-place-of-an-image": case(
        lambda b: read_row(datasets.Dataset.from_dict({"image": ["cat.jpg"]}), 0, "rows"),
        ValueError,
        "holds str",
        "cast_column('image'",
    ),
    "evaluation": case(
        lambda b: zero_shot_accuracy(
            b.model, b.processor, stored(b"junk", b.folder), ["a photo of a {}"], disable_tqdm=True
        ),
        ValueError,
        "Row 1: the image in column 'image' can't be read",
        "drop the row",
    ),
    "file-is-gone": case(
        lambda b: image_digest(
            datasets.Dataset.from_dict({"image": [str(b.folder / "gone.png")]}).cast_column("image", datasets.Image()),
            "image",
        ),
        ValueError,
        "Row 0: the image in column 'image'",
        "gone.png",
        "Fix the file",
    ),
    "no-picture-to-draw-on": case(
        lambda b: TypographicAttack(words=CLASSES).draw("cat.jpg", "dog", 0), TypeError, "PIL image, got str", "Image"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_image_that_cannot_be_used_is_refused(name, bench):
    found = CASES[name]
    if found.kind is ValueError:  # of the kind that on_bad_image acts on
        with pytest.raises(ValueError) as error:
            found.call(bench)
        message = str(error.value)
        assert [piece for piece in found.says if piece not in message] == [], message
    else:
        check(found, bench)


def test_a_bug_in_a_transform_is_not_taken_for_a_broken_image():
    def transform(batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read_row(make_labelled(2).with_transform(transform), 0, "train_dataset")


def test_training_on_unusual_images_works(bench):
    rows = make_preferences(4).cast_column("image", datasets.Image(decode=False))
    kinds = [
        make() for make, *_ in (UNUSUAL["cmyk"], UNUSUAL["transparent"], UNUSUAL["sixteen-bits"], UNUSUAL["long"])
    ]
    images = [{"bytes": data, "path": None} for data in kinds]
    rows = rows.remove_columns("image").add_column("image", images, feature=datasets.Image())
    trainer = bench.trainer(rows, max_steps=2)
    trainer.train()
    assert torch.isfinite(torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])).all()
    assert list(trainer.candidates.texts) == PROMPTS
