"""The typographic attack: what is drawn, where, how legibly, and that it is drawn from its key alone."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from drawn import GREY, WORDS, attack, flat
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessorPil

from clip_po.data.attacks.attack import PLACES, TypographicAttack
from clip_po.data.attacks.fonts import font_files

# ---- What is drawn from what


DIGEST = """
import hashlib
from PIL import Image, ImageFilter
from clip_po.data.attacks.attack import TypographicAttack
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


@pytest.mark.parametrize("word", ["cat", "hot dog", "t-shirt", "Route 66", "Straße", "кот", "я"])
def test_control_is_as_long_as_the_word_and_says_nothing(word):
    drawn = attack(words=[word, "dog"], fonts=font_files(["DejaVuSans"]))
    controls = {drawn.meaningless(word, index) for index in range(50)}
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
    with pytest.raises(ValueError, match=f"as long as '{words[0]}'.*Give longer words"):
        attack(words=words).meaningless(words[0], 0)


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


@pytest.mark.parametrize("size", [(320, 200), (90, 333), (64, 64), (20, 31)])
def test_a_crop_draws_on_the_very_pixels_that_the_processor_shows(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    maker = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    drawn = attack(crop=64)
    assert drawn.canvas(image).size == (64, 64)
    shown, canvas = (
        maker([picture], return_tensors="np")["pixel_values"][0] for picture in (image, drawn.canvas(image))
    )
    np.testing.assert_array_equal(shown, canvas)
    # What is written there is what the model gets: nothing is resized or cut off any more.
    written = drawn.draw(image, "dog", 0)
    assert written.size == (64, 64)
    np.testing.assert_array_equal(np.asarray(written), np.asarray(drawn.draw(drawn.canvas(image), "dog", 0)))


def test_a_crop_keeps_the_whole_word_of_a_long_image():
    long = flat(GREY, (600, 100))
    for row in range(20):
        seen = attack(crop=64).draw(long, "dog", row)
        cut = attack().draw(long, "dog", row).resize((384, 64)).crop((160, 0, 224, 64))
        assert np.any(np.asarray(seen) != GREY)
        if not np.any(np.asarray(cut) != GREY):
            break
    else:
        raise AssertionError("no word fell outside of the middle: the test shows nothing")


# ---- What would fail in the middle of a run

MOON = {"other_words": ["moon"], "other_share": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"words": ["Cat", "cat"]}, "at least two different words"),
        ({"words": ["polar_bear", "polar bear", "dog"], "count": (1, 2)}, "from 1 to 1"),
        ({"other_words": ["Cat", "dog "], "other_share": 0.1}, "other_words are all among words"),
    ],
)
def test_spellings_of_one_word_are_counted_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        TypographicAttack(**{"words": ["cat", "dog"], **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "words": ["dog", "CAT"],
            "count": (1, 1),
            **MOON,
            "exclude": ["cat", "dog"],
        },
        {"words": ["dog", "bird"], "exclude": ["dog", "bird"]},
        {"words": ["dog", "bird", "fish"], "count": (1, 2), "exclude": ["Fish", "bird"]},
        {
            "words": ["dog", "bird", "fish"],
            "count": (1, 2),
            **MOON,
            "exclude": [],
        },
    ],
)
def test_rows_that_could_run_out_of_words_are_refused(arguments):
    exclude = arguments.pop("exclude")
    with pytest.raises(ValueError, match="too few are left"):
        TypographicAttack(**arguments).check_words_left(exclude)
    TypographicAttack(["dog", "bird", "fish"], count=(1, 2)).check_words_left(["dog"])


def test_the_control_of_a_text_spells_no_word_in_any_of_its_parts():
    two = TypographicAttack(["tv", *(f"{a}v" for a in "bcdfghjklmnpqrsvwx")], min_side=32)
    for index in range(100):
        assert "zv" not in two.words
        assert not set(two.meaningless("cat tv", index).split()) & set(two.words)


@pytest.mark.parametrize("draw", ["meaningless", "draw_blank"])
def test_no_word_at_all_is_refused(draw):
    given = ("", 0) if draw == "meaningless" else (flat(), " ", 0)
    with pytest.raises(ValueError, match="must not be empty"):
        getattr(attack(), draw)(*given)
