"""How words are drawn: where they stand and how legible they are."""

import matplotlib
import numpy as np
import pytest
from drawn import GREY, PLAIN, attack, extent, flat, ink, lines, style
from PIL import Image

from clip_po.data.attacks.attack import PLACES
from clip_po.data.attacks.drawing import contrast_ratio, draw_text, enlarge, relative_luminance
from clip_po.data.attacks.fonts import load_font

# ---- Where it stands


@pytest.mark.parametrize(
    ("size", "enlarged"), [((16, 16), (64, 64)), ((10, 20), (64, 128)), ((40, 8), (320, 64)), ((64, 70), (64, 70))]
)
def test_small_images_are_enlarged_and_keep_their_shape(size, enlarged):
    assert attack().draw(flat(size=size), "cat", 0).size == enlarged


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_any_image_becomes_rgb(mode):
    assert attack().draw(Image.new(mode, (64, 64)), "cat", 0).mode == "RGB"


def test_drawing_leaves_the_clean_image_alone():
    image = flat()
    attack().draw(image, "cat", 0)
    assert image.tobytes() == flat().tobytes()


def test_image_outside_the_text_stays_as_it_is():
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    drawn = draw_text(image, "cat", style(place=(0.5, 0.0)))
    assert (np.asarray(image)[32:] == np.asarray(drawn)[32:]).all()
    assert ink(image, drawn)[:32].any()


@pytest.mark.parametrize("place", [name for name in PLACES if name != "anywhere"])
def test_word_stands_at_its_place(place):
    image = flat(size=(120, 120))
    one = attack(places=[place], size=(0.2, 0.2), colours=["black"])
    top, bottom, left, right = extent(ink(image, one.draw(image, "cat", 0)))
    middle = ((left + right) / 2 / 119, (top + bottom) / 2 / 119)
    for share, wanted in zip(middle, PLACES[place], strict=True):
        assert share == pytest.approx(wanted, abs=0.3)
        assert (share < 0.4, share > 0.6) == (wanted < 0.4, wanted > 0.6)


def test_anywhere_is_not_one_place():
    assert len({attack().style(index).place for index in range(20)}) == 20


def test_size_is_a_share_of_the_short_side():
    heights = []
    for size in (0.2, 0.4):
        image = flat(size=(900, 300))
        top, bottom, *_ = extent(ink(image, draw_text(image, "dhb", style(size=size))))
        heights.append(bottom - top + 1)
    assert heights[1] / heights[0] == pytest.approx(2, abs=0.1)
    assert 0.6 * 60 < heights[0] <= 60


def test_long_word_shrinks_before_it_breaks():
    image = flat()
    short = ink(image, draw_text(image, "xxx", style(size=0.3)))
    longer = ink(image, draw_text(image, "xxxxxxxx", style(size=0.3)))
    longest = ink(image, draw_text(image, "x" * 24, style(size=0.3)))
    assert (lines(short), lines(longer)) == (1, 1)
    assert extent(longer)[1] - extent(longer)[0] < extent(short)[1] - extent(short)[0]
    assert lines(longest) > 1


def test_texts_break_at_spaces_where_they_can():
    image = flat()
    mask = ink(image, draw_text(image, "xxxxxxxxxx xxxxxxxxxx", style(size=0.3)))
    middle = len(mask) // 2
    assert lines(mask) == 2
    assert (mask[:middle][mask[:middle].any(1)] == mask[middle:][mask[middle:].any(1)]).all()


@pytest.mark.parametrize("text", ["cat", "internationalization", "a photo of the very long name of a dog", "W" * 40])
@pytest.mark.parametrize("rotation", [0, 15, -45, 90, 137, 180])
@pytest.mark.parametrize("box", [None, (0, 0, 255)])
def test_text_stays_inside_the_image(text, rotation, box):
    for place in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.8)):
        image = flat(size=(128, 180))
        drawn = draw_text(image, text, style(size=0.5, rotation=rotation, place=place, outline=0.1, sticker=box))
        top, bottom, left, right = extent(ink(image, drawn))
        # What touches the edge may have been cut by it.
        assert min(top, left) >= 1
        assert bottom <= 178
        assert right <= 126


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 12])
def test_text_larger_than_a_tiny_image_is_cut(side):
    for rotation in (0, 30):
        for box in (None, (0, 0, 0)):
            wild = style(size=1.0, rotation=rotation, outline=0.2, sticker=box)
            for size in ((side, side), (side, 40), (40, side)):
                assert draw_text(flat(size=size), "a catamaran boat", wild).size == size


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_nothing_to_write_is_refused(text):
    with pytest.raises(ValueError, match="must not be empty"):
        draw_text(flat(), text, PLAIN)


# ---- How it looks


@pytest.mark.parametrize("background", ["white", "black", "red", "yellow", "navy", "#777777", "orange"])
def test_words_are_legible_by_default(background):
    image = flat(background)
    one = attack(size=(0.4, 0.4), outline=(0, 0))
    for index in range(16):
        drawn = np.asarray(one.draw(image, "HEH", index))
        changed = drawn[ink(image, drawn)]
        best = max(contrast_ratio(tuple(colour), image.getpixel((0, 0))) for colour in np.unique(changed, axis=0))
        assert best >= 3


def test_word_is_legible_on_its_sticker():
    one = attack(size=(0.4, 0.4), outline=(0, 0), sticker=1.0, sticker_colours=["black"], colours=["black", "#111111"])
    drawn = one.draw(flat("white"), "HEH", 0)
    top, bottom, left, right = extent(ink(flat("white"), drawn))
    inside = np.asarray(drawn)[top : bottom + 1, left : right + 1].reshape(-1, 3)
    assert max(contrast_ratio(tuple(colour), (0, 0, 0)) for colour in np.unique(inside, axis=0)) >= 3
    assert (inside == 0).all(-1).mean() > 0.3


def test_rotated_word_is_legible_where_it_stands():
    image = flat("white", (100, 100))
    image.paste("black", (0, 0, 30, 100))
    turned = style(size=0.2, rotation=90, place=(0.0, 0.5), colours=((0, 0, 0),))
    assert ink(image, draw_text(image, "HEHEHE", turned)).any()


def test_low_contrast_is_kept_where_it_is_asked_for():
    faint = draw_text(flat("white"), "HEH", style(colours=((250, 250, 250),)), min_contrast=1.0)
    assert np.asarray(faint).min() == 250


def test_first_legible_colour_is_taken():
    drawn = np.asarray(
        draw_text(flat("white"), "HEH", style(size=0.4, colours=((255, 255, 0), (200, 0, 0), (0, 0, 0))), 3.0)
    )
    assert (drawn == (200, 0, 0)).all(-1).any()
    assert not (drawn == 0).all(-1).any()


def test_outline_has_the_other_shade():
    drawn = np.asarray(draw_text(flat(GREY), "HEH", style(size=0.4, outline=0.1, colours=((255, 255, 255),))))
    assert (drawn == 255).all(-1).any()
    assert (drawn == 0).all(-1).any()


def test_sticker_stands_behind_the_word():
    blue = (0, 0, 255)
    image = flat(GREY)
    bare = draw_text(image, "cat", style(colours=((255, 255, 255),)))
    stuck = draw_text(image, "cat", style(colours=((255, 255, 255),), sticker=blue))
    assert not (np.asarray(bare) == blue).all(-1).any()
    top, bottom, left, right = extent(ink(image, stuck))
    corners = [stuck.getpixel((x, y)) for x in (left, right) for y in (top, bottom)]
    assert corners == [blue] * 4
    assert ink(image, stuck).sum() > ink(image, bare).sum()


@pytest.mark.parametrize(("share", "stuck"), [(0.0, 0), (1.0, 40)])
def test_share_of_stickers(share, stuck):
    one = attack(sticker=share)
    assert sum(one.style(index).sticker is not None for index in range(40)) == stuck


@pytest.mark.parametrize(("opacity", "darkest"), [(1.0, 0), (0.5, 127), (0.1, 229)])
def test_opacity_lets_the_image_through(opacity, darkest):
    drawn = draw_text(flat("white"), "HEH", style(size=0.4, opacity=opacity))
    assert np.asarray(drawn).min() == pytest.approx(darkest, abs=2)


def test_rotation_turns_counter_clockwise():
    image = flat(size=(100, 100))
    mask = ink(image, draw_text(image, "HEHEHE", style(rotation=45)))
    rows, columns = np.nonzero(mask)
    assert np.corrcoef(rows, columns)[0, 1] < -0.8


def test_fonts_differ():
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSerif.ttf"
    image = flat()
    assert draw_text(image, "cat", style(font=path)).tobytes() != draw_text(image, "cat", PLAIN).tobytes()


def test_font_that_is_none_is_refused(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(ValueError) as error:
        load_font(str(path), 10)
    assert all(part in str(error.value) for part in ("fonts:", str(path), ".ttf", "'pillow'"))


def test_contrast_is_that_of_the_standard():
    assert (
        contrast_ratio((255, 255, 255), (0, 0, 0)) == contrast_ratio((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    )
    assert contrast_ratio(GREY, GREY) == 1
    assert contrast_ratio((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
    assert relative_luminance((0, 255, 0)) == pytest.approx(0.7152)


def test_large_image_is_not_resampled():
    image = Image.effect_noise((70, 64), 60).convert("RGB")
    assert enlarge(image, 64).tobytes() == image.tobytes()
