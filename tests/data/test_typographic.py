"""The typographic attack: what is drawn, where, how legibly, and that it is drawn from its key alone."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFilter

from clip_po.data.drawing import TextStyle, contrast_ratio, draw_text, enlarge, load_font, relative_luminance
from clip_po.data.typographic import PLACES, TypographicAttack

WORDS = ("cat", "dog", "bird", "hot dog")
GREY = (128, 128, 128)


def flat(colour="white", size=(64, 64)):
    return Image.new("RGB", size, colour)


def attack(**arguments):
    return TypographicAttack(**{"words": WORDS, "min_side": 64, **arguments})


def ink(before, after):
    """Where an image changed, bool[H, W]."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def extent(mask):
    """First and last row and column where anything changed."""
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return down[0], down[-1], across[0], across[-1]


def lines(mask):
    """How many runs of inked rows there are."""
    inked = mask.any(1).astype(int)
    return int((np.diff(np.concatenate([[0], inked])) == 1).sum())


PLAIN = TextStyle(
    font="pillow",
    size=0.2,
    place=(0.5, 0.5),
    colours=((0, 0, 0),),
    outline=0.0,
    rotation=0.0,
    opacity=1.0,
    sticker=None,
)


def style(**changes):
    return dataclasses.replace(PLAIN, **changes)


# ---- What is drawn from what


DIGEST = """
import hashlib
from PIL import Image, ImageFilter
from clip_po.data.typographic import TypographicAttack
attack = TypographicAttack(["cat", "dog", "bird"], min_side=64, rotation=(-30, 30), sticker=0.5, seed=3)
image = Image.linear_gradient("L").convert("RGB")
pixels = b"".join(attack.draw(image, attack.word(i, 1), i, 1).tobytes() for i in range(5))
print(hashlib.sha256(pixels).hexdigest())
"""


def test_same_pixels_in_a_process_with_other_string_hashes():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("changed", [{"index": 1}, {"epoch": 1}, {"seed": 1}])
def test_row_epoch_and_seed_draw_other_pixels(changed):
    key = {"index": 0, "epoch": 0, "seed": 0}

    def drawn(index, epoch, seed):
        return attack(seed=seed).draw(flat(GREY), "cat", index, epoch).tobytes()

    assert drawn(**key) == drawn(**key)
    assert drawn(**key) != drawn(**{**key, **changed})


def test_words_change_with_the_epoch():
    words = [[attack().word(index, epoch) for index in range(20)] for epoch in (0, 1)]
    assert words[0] != words[1]


def test_never_redrawn_attack_is_that_of_epoch_0():
    never, every = attack(redraw="never"), attack()
    for index in range(10):
        assert never.word(index, epoch=5) == never.word(index, epoch=0) == every.word(index, epoch=0)
        assert never.style(index, epoch=5) == every.style(index, epoch=0)
        assert never.meaningless("cat", index, epoch=5) == every.meaningless("cat", index, epoch=0)


def test_word_is_never_the_true_class():
    drawn = {attack().word(index, epoch, exclude={"cat"}) for index in range(100) for epoch in range(3)}
    assert drawn == set(WORDS) - {"cat"}


def test_exclusion_ignores_case():
    drawn = {attack().word(index, exclude={"Cat"}) for index in range(100)}
    assert drawn == set(WORDS) - {"cat"}


def test_no_word_left_is_an_error_of_that_row():
    with pytest.raises(ValueError) as error:
        attack(words=["cat", "dog"]).word(7, exclude={"cat", "dog"})
    assert "row 7" in str(error.value)
    assert "give more words" in str(error.value)


def test_style_does_not_depend_on_the_words():
    wild = {"rotation": (-90, 90), "sticker": 0.5, "opacity": (0.3, 1), "places": list(PLACES)}
    first, second = attack(**wild), attack(words=["a much longer word", "x", "y"], **wild)
    assert [first.style(i, 2) for i in range(50)] == [second.style(i, 2) for i in range(50)]


def test_styles_stay_in_their_ranges_and_use_them():
    ranges = {"size": (0.2, 0.4), "outline": (0.0, 0.1), "rotation": (-20.0, 10.0), "opacity": (0.5, 0.9)}
    drawn = [attack(**ranges).style(index) for index in range(200)]
    for name, (lowest, highest) in ranges.items():
        values = [getattr(one, name) for one in drawn]
        assert lowest <= min(values) < lowest + 0.1 * (highest - lowest)
        assert highest >= max(values) > highest - 0.1 * (highest - lowest)


@pytest.mark.parametrize("word", ["cat", "hot dog", "t-shirt", "Route 66", "Straße", "猫", "кот"])
def test_control_is_as_long_as_the_word_and_says_nothing(word):
    controls = {attack(words=[word, "dog"]).meaningless(word, index) for index in range(50)}
    for control in controls:
        assert len(control) == len(word)
        assert not set(control) & set("aeiouyAEIOUY0123456789")
        assert [c for c in control if not c.isalpha()] == [c for c in word if not c.isalnum()]
    assert len(controls) > (5 if len(word) > 1 else 0)


def test_control_is_no_attack_word():
    consonants = tuple("bcdfghjklmnpqrstvw")
    controls = {attack(words=consonants).meaningless("b", index) for index in range(100)}
    assert controls <= {"x", "z"}


@pytest.mark.parametrize("words", [["!!", "dog"], [*"bcdfghjklmnpqrstvwxz"]])
def test_word_without_a_control_is_refused(words):
    with pytest.raises(ValueError, match=f"as long as '{words[0]}'.*give longer words"):
        attack(words=words).meaningless(words[0], 0)


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


WRONG = {
    "words-one": ({"words": ["cat"]}, "words", "at least two different words"),
    "words-equal": ({"words": ["cat", "cat"]}, "words", "at least two different words"),
    "words-string": ({"words": "cat"}, "words", "'cat'"),
    "words-empty": ({"words": ["cat", " "]}, "words", "none empty"),
    "size-zero": ({"size": (0, 0)}, "size must be (lowest, highest) within [0, 1], got (0, 0)"),
    "size-above": ({"size": (0.5, 1.5)}, "size must be (lowest, highest)", "(0.5, 1.5)"),
    "size-reversed": ({"size": (0.5, 0.2)}, "size must be (lowest, highest)", "(0.5, 0.2)"),
    "outline-negative": ({"outline": (-0.1, 0.1)}, "outline must be (lowest, highest)"),
    "rotation": ({"rotation": (-400, 0)}, "rotation must be (lowest, highest) within [-360, 360]"),
    "opacity-zero": ({"opacity": (0, 0)}, "opacity must be (lowest, highest)"),
    "sticker": ({"sticker": 1.5}, "sticker", "0 to 1", "1.5"),
    "redraw": ({"redraw": "always"}, "redraw must be 'every_epoch' or 'never'", "'always'"),
    "min-side": ({"min_side": 0}, "min_side", ">= 1", "0"),
    "places-unknown": ({"places": ["middle"]}, "places", "['middle']", "'center'"),
    "places-string": ({"places": "center"}, "places must be a list", "'center'"),
    "fonts-empty": ({"fonts": []}, "fonts must be a list that is not empty"),
    "fonts-missing": ({"fonts": ["nowhere.ttf"]}, "fonts: 'nowhere.ttf' can't be read", ".ttf or .otf"),
    "colours-string": ({"colours": "red"}, "colours must be a list", "'red'"),
    "colours-unknown": ({"colours": ["reddish"]}, "colours", "'reddish'"),
    "sticker-colours-unknown": ({"sticker_colours": ["reddish"]}, "sticker_colours", "'reddish'"),
    "sticker-colours-empty": ({"sticker_colours": []}, "sticker_colours must be a list that is not empty"),
    "min-contrast": ({"min_contrast": 30}, "min_contrast", "1 to 21", "30"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_argument_out_of_range_is_named(case):
    arguments, *parts = case
    with pytest.raises(ValueError) as error:
        attack(**arguments)
    assert [part for part in parts if part not in str(error.value)] == []


def darkness(image):
    return 1 - np.asarray(image.convert("L")).mean() / 255


@pytest.mark.parametrize(
    "words", [["zero", "seven", "three"], ["ZERO", "SEVEN", "THREE"], ["truck", "airplane", "ox"]]
)
def test_the_control_has_about_the_words_ink_in_its_size_and_lines(words):
    attack = TypographicAttack(
        words=words, colours=["black"], size=(0.2, 0.6), min_side=96, sticker=0, rotation=(0, 0)
    )
    blank = flat("white", (96, 96))
    inked = [
        (darkness(attack.draw(blank, word, row)), darkness(attack.draw_control(blank, word, row)))
        for row in range(60)
        for word in words
    ]
    of_words, of_controls = np.array(inked).T
    assert abs(of_controls.mean() / of_words.mean() - 1) < 0.05
    assert np.corrcoef(of_words, of_controls)[0, 1] > 0.95


def test_the_control_keeps_the_words_case():
    attack = TypographicAttack(words=["New York", "Rome"])
    control = attack.meaningless("New York", 3)
    assert [c.isupper() for c in control] == [c.isupper() for c in "New York"]
    assert control[3] == " "


# ---- Several words, and words that are no class


def test_an_attack_of_one_word_draws_the_same_word_whatever_the_count_says():
    one, many = TypographicAttack(words=list("abcdef")), TypographicAttack(words=list("abcdef"), count=(1, 3))
    lengths = set()
    for index in range(60):
        words = many.written(index)
        assert words[0] == one.word(index)
        assert len(set(words)) == len(words)
        lengths.add(len(words))
    assert lengths == {1, 2, 3}


def test_other_words_have_their_share_and_name_no_class():
    attack = TypographicAttack(words=["cat", "dog"], other_words=["moon", "CAT", "sugar", "moon"], other_share=0.25)
    assert attack.vocabulary == ["cat", "dog", "moon", "sugar"]
    words = [attack.word(index, exclude={"dog"}) for index in range(800)]
    assert set(words) == {"cat", "moon", "sugar"}
    assert 0.2 < sum(word != "cat" for word in words) / 800 < 0.3


def test_without_a_share_other_words_are_never_written():
    assert TypographicAttack(words=["cat", "dog"], other_words=["moon"]).vocabulary == ["cat", "dog"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"other_share": 0.5}, "needs other_words"),
        ({"other_share": 1.5, "other_words": ["moon"]}, "0 to 1"),
        ({"count": (0, 1)}, "count"),
        ({"count": (2, 1)}, "count"),
        ({"count": (1, 3)}, "count"),
    ],
)
def test_words_that_cannot_be_drawn_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        TypographicAttack(words=["cat", "dog", "bird"], **arguments)


@pytest.mark.parametrize("sticker", [0.0, 1.0])
def test_a_blank_box_covers_every_pixel_of_the_word_and_says_nothing(sticker):
    attack = TypographicAttack(words=["cat", "dog"], min_side=64, sticker=sticker, rotation=(-20, 20))
    grey = Image.new("RGB", (64, 64), (120, 90, 150))
    for index in range(8):
        word, blank = (
            np.any(np.asarray(picture) != np.asarray(grey), axis=-1)
            for picture in (attack.draw(grey, "cat", index), attack.draw_blank(grey, "cat", index))
        )
        # Edges of turned letters are smoothed: one pixel around the box may be tinged.
        grown = np.asarray(Image.fromarray(blank).filter(ImageFilter.MaxFilter(3)))
        assert (grown | ~word).all()
        inside = np.asarray(attack.draw_blank(grey, "cat", index))[blank]
        assert len(np.unique(np.median(inside, axis=0).reshape(1, 3), axis=0)) == 1
        assert (np.abs(inside - np.median(inside, axis=0)).max(axis=-1) < 8).mean() > 0.7
