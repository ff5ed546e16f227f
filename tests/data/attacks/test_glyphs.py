"""Words that a font can't draw: a box in place of a letter would be an attack without a word."""

import string
import unicodedata

import numpy as np
import pytest
from drawn import flat
from PIL import Image

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.drawing import TextStyle, draw_text
from clip_po.data.attacks.fonts import PILLOW_FONT, font_files, training_fonts, unseen_fonts
from clip_po.data.attacks.glyphs import fonts_for, missing_letters

SANS, TEX, ROMAN = font_files(["DejaVuSans", "cmss10", "cmr10"])
BUILT_IN = (*training_fonts(), *unseen_fonts())


@pytest.mark.parametrize("font", BUILT_IN)
def test_every_built_in_font_draws_letters_digits_and_common_signs(font):
    assert missing_letters(f"{string.ascii_letters}{string.digits} .,:;!?()'&/+-", font) == ""


@pytest.mark.parametrize(
    ("text", "font", "missing"),
    [
        ("café", PILLOW_FONT, "é"),
        ("café", SANS, ""),
        (unicodedata.normalize("NFD", "café"), SANS, ""),
        ("дом", ROMAN, "дом"),
        ("¡sí!", ROMAN, "¡í"),
        ("кошка", SANS, ""),
        ("猫", SANS, "猫"),
        ("猫", font_files(["STIXGeneral"])[0], "猫"),
        ("a_b<c", TEX, "_<"),
        ("a_b<c", ROMAN, "_<"),
        ("a_b<c", SANS, ""),
        ("cat 🦄", SANS, "🦄"),
        ("hot dog", TEX, ""),
    ],
)
def test_letters_that_a_font_lacks_are_known(text, font, missing):
    assert missing_letters(text, font) == missing


def test_a_font_that_lacks_letters_is_left_out_for_that_word_alone():
    drawn = TypographicAttack(["кошка", "dog"], fonts=[TEX, SANS, ROMAN, PILLOW_FONT], min_side=64)
    alone = TypographicAttack(["кошка", "dog"], fonts=[SANS], min_side=64)
    image = flat(size=(64, 64))
    rows = range(24)
    assert {drawn.style(index).font for index in rows} == {TEX, SANS, ROMAN, PILLOW_FONT}
    for index in rows:
        changed = np.asarray(drawn.draw(image, "кошка", index))
        style = drawn.style(index)
        own = TextStyle(**{**vars(style), "font": SANS})
        assert np.array_equal(changed, np.asarray(draw_text(alone.canvas(image), "кошка", own)))
        assert np.array_equal(
            np.asarray(drawn.draw(image, "dog", index)), np.asarray(draw_text(drawn.canvas(image), "dog", style))
        )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("猫", "fonts-noto-cjk"),
        ("ねこ", "fonts-noto-cjk"),
        ("고양이", "fonts-noto-cjk"),
        ("बिल्ली", "fonts-noto-core"),
        ("🦄", "fonts-symbola"),
        ("café", "DejaVuSans.ttf"),
        ("a_b", "pillow"),
        ("two\nlines", "line break"),
        ("a\x00b", "control character"),
        ("\u200b", "empty"),
    ],
)
def test_a_word_that_no_font_draws_is_refused_with_a_font_that_may(word, said):
    with pytest.raises(ValueError, match=said):
        TypographicAttack([word, "dog"], fonts=[TEX] if word == "a_b" else [PILLOW_FONT])
    style = TypographicAttack(["cat", "dog"], fonts=[TEX]).style(0)
    with pytest.raises(ValueError, match=r"words: |must not be empty"):
        draw_text(Image.new("RGB", (64, 64)), word, style)


def test_words_that_may_share_an_image_share_a_font():
    with pytest.raises(ValueError, match="none of the 1 fonts"):
        TypographicAttack(["猫", "dog", "cat"], fonts=[SANS])
    TypographicAttack(["кот", "dog", "café"], fonts=[TEX, SANS], count=(1, 2))


def test_words_from_right_to_left_need_what_sets_them(monkeypatch):
    assert fonts_for("שלום", [SANS]) == [SANS]
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ValueError, match=r"right to left.*libraqm"):
        fonts_for("שלום", [SANS])
