"""The attack for any image and any word: it is there, whole, inside and legible, and drawn from its key alone."""

import contextlib
import unicodedata

import numpy as np
import pytest
from drawn import extent, ink
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_po.data.attacks.attack import PLACES, TypographicAttack
from clip_po.data.attacks.drawing import SMALLEST_TEXT, TextStyle, contrast_ratio, draw_text, enlarge
from clip_po.data.attacks.fonts import font_files, training_fonts
from clip_po.data.attacks.glyphs import missing_letters
from clip_po.data.attacks.words import spelling
from clip_po.data.images import MOST_ELONGATED

SIDE = 96
(SANS,) = font_files(["DejaVuSans"])


def is_written(letter):
    """Whether a letter has ink, a glyph, and its place from left to right."""
    return (
        unicodedata.category(letter)[0] in "LNPS"
        and unicodedata.bidirectional(letter) not in ("R", "AL")
        and not missing_letters(letter, SANS)
    )


LETTERS = st.sampled_from([letter for letter in map(chr, range(33, 0x3000)) if is_written(letter)])
WORDS = st.text(st.one_of(st.sampled_from("aeilmnorstWQy "), LETTERS), min_size=1, max_size=40).filter(str.strip)
SIZES = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.just(1), st.integers(1, 12)),
    st.tuples(st.integers(150, 400), st.integers(8, 16)),
    st.just((900, 700)),
).filter(lambda size: max(size) <= MOST_ELONGATED * min(size))
COLOURS = st.tuples(*[st.integers(0, 255)] * 3)
KEYS = st.tuples(st.integers(0, 10**6), st.integers(0, 50))


def attack(word, **changes):
    return TypographicAttack([word, f"not {word}"], **{"min_side": SIDE, "fonts": [SANS], **changes})


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20))
def test_any_text_is_drawn_or_refused_in_words(word):
    refused = pytest.raises(ValueError, match="word")
    with refused if not word.strip() or missing_letters(word, SANS) else contextlib.nullcontext():
        attack(word)


def edge(mask):
    """What of a mask lies on the outermost pixels."""
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


@settings(max_examples=40)
@given(SIZES, WORDS, COLOURS, KEYS)
@example((1, 1), "W" * 40, (255, 255, 255), (0, 0))
@example((1, 12), "a photo of a dog", (0, 0, 0), (1, 0))
@example((300, 2), "two words", (0, 0, 0), (3, 1))
def test_a_word_is_there_and_whole_on_an_image_of_any_size(size, word, colour, key):
    one = attack(word, rotation=(-15, 15), outline=(0, 0.05), places=list(PLACES))
    clean = enlarge(Image.new("RGB", size, colour), SIDE)
    drawn = one.draw(Image.new("RGB", size, colour), word, *key)
    assert min(clean.size) >= SIDE or clean.size == size
    assert drawn.size == clean.size
    mask = ink(clean, drawn)
    assert mask.any()
    assert not edge(mask).any()  # what touches the edge may have been cut by it


@given(st.text(st.sampled_from("HEIMNTLFKVXZ "), min_size=1, max_size=30).filter(str.strip), COLOURS, KEYS)
def test_a_word_is_legible_on_any_colour(word, colour, key):
    image = Image.new("RGB", (SIDE, SIDE), colour)
    one = attack(word, outline=(0, 0), rotation=(0, 0), fonts=training_fonts())
    drawn = one.draw(image, word, *key)
    top, bottom, left, right = extent(ink(image, drawn))
    assert bottom - top + 1 >= 0.6 * SMALLEST_TEXT
    shades = np.unique(np.asarray(drawn)[top : bottom + 1, left : right + 1].reshape(-1, 3), axis=0)
    behind = one.style(*key).sticker or colour
    assert max(contrast_ratio(tuple(map(int, shade)), behind) for shade in shades) >= 3


@settings(max_examples=8)
@given(st.text(LETTERS, min_size=50, max_size=400), st.integers(-180, 180), st.integers(32, 120))
@example("a " * 1000, 5, 64)
@example("W" * 1000, 45, 64)
def test_a_text_of_any_length_leaves_ink_inside(text, rotation, side):
    style = TextStyle(SANS, 0.4, (0.5, 0.5), ((0, 0, 0),), 0.02, float(rotation), 1.0, None)
    image = Image.new("RGB", (side, side), "white")
    mask = ink(image, draw_text(image, text, style))
    assert mask.any()
    assert not edge(mask).any()


@given(SIZES, WORDS, st.booleans(), st.floats(0, 1), st.integers(-180, 180))
def test_no_style_breaks_on_an_image_too_small_for_any_word(size, word, sticker, share, rotation):
    box = (1, 2, 3) if sticker else None
    style = TextStyle(SANS, share, (share, share), ((0, 0, 0),), 0.3, float(rotation), 1.0, box)
    assert draw_text(Image.new("RGB", size), word, style).size == size


@settings(max_examples=30)
@given(WORDS, KEYS, st.integers(0, 100))
def test_pixels_come_from_seed_epoch_and_row_alone(word, key, seed):
    index, epoch = key
    image = Image.linear_gradient("L").convert("RGB").resize((SIDE, SIDE))

    def drawn(**changes):
        given = {"seed": seed, "index": index, "epoch": epoch, "redraw": "every_epoch", **changes}
        one = attack(word, seed=given["seed"], redraw=given["redraw"])
        return one.draw(image, word, given["index"], given["epoch"]).tobytes()

    assert drawn() == drawn()
    assert len({drawn(), drawn(epoch=epoch + 1), drawn(index=index + 1), drawn(seed=seed + 1)}) > 2
    assert drawn(redraw="never") == drawn(epoch=0) == drawn(redraw="never", epoch=epoch + 1)


@settings(max_examples=40)
@given(SIZES, st.text(st.sampled_from("catdogshipWill "), min_size=3, max_size=30).filter(str.strip), KEYS)
def test_the_control_of_a_word_stays_inside_too(size, word, key):
    assume(any(letter.isalpha() for letter in word))
    clean = Image.new("RGB", size, (90, 90, 90))
    mask = ink(enlarge(clean, SIDE), attack(word).draw_control(clean, word, *key))
    assert mask.any()
    assert not edge(mask).any()


@settings(max_examples=40)
@given(st.lists(WORDS.filter(spelling), min_size=2, max_size=6, unique_by=spelling), KEYS, st.integers(0, 5))
def test_the_written_word_is_never_an_excluded_one(words, key, which):
    excluded = words[which % len(words)]
    shouted = excluded.upper() if excluded.upper().casefold() == excluded.casefold() else excluded  # not so for a few
    written = TypographicAttack(words, min_side=SIDE, fonts=[SANS]).written(*key, exclude={shouted})
    assert len(written) == 1
    assert written[0].casefold() != excluded.casefold()
