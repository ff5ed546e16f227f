"""Which answers changed, counted by hand, and what a page shows of them."""

import numpy as np
from PIL import Image

from clip_po.evaluation.report.before_after import before_after_grid
from clip_po.evaluation.report.changed_answers import changed_answers, changed_answers_gallery
from clip_po.evaluation.report.page_cards import card_gallery
from clip_po.evaluation.robustness import Answers

NAMES = ("cat", "dog", "car")
LABEL = np.array([0, 0, 1, 1, 2, 2, 2])
BEFORE = np.array([0, 0, 1, 0, 0, 0, 2])
AFTER = np.array([1, 0, 2, 1, 1, 0, 2])


def answers(after=AFTER):
    return Answers.about_clean(NAMES, LABEL, {"base": BEFORE, "aligned": after})


def picture(index):
    return Image.new("RGB", (64, 64), (index, 20, 200))


def gallery(**arguments):
    return changed_answers_gallery(answers(), "base", "aligned", "things", picture, **arguments)


def test_changed_answers_by_hand():
    found = {kind: rows.tolist() for kind, rows in changed_answers(answers(), "base", "aligned").items()}
    assert found == {"newly broken": [0, 2], "fixed": [3], "still wrong": [4]}
    assert gallery().note == (
        "Of 7 images of things: 2 newly broken, 1 fixed, 1 still wrong with another answer, 3 with the same answer."
    )
    assert changed_answers_gallery(answers(BEFORE), "base", "aligned", "things", picture) is None


def test_an_example_has_the_truth_and_both_answers():
    shown = {e.index: (e.change, e.truth, e.word, e.before, e.after) for e in gallery().examples}
    assert shown[2] == ("newly broken", "dog", "", "dog", "car")
    assert shown[4] == ("still wrong", "car", "", "cat", "dog")
    assert [e.change for e in gallery(count=3).examples] == ["newly broken", "fixed", "still wrong"]
    assert gallery(count=1, seed=1) == gallery(count=1, seed=1)
    assert {gallery(count=1, seed=seed).examples[0].index for seed in range(20)} == {0, 2}


def test_cards_have_no_word_and_a_wrong_answer_is_not_the_word(tmp_path):
    cards = card_gallery(gallery())
    assert not cards.with_words
    assert list(cards.cards) == ["newly broken", "fixed", "still wrong"]
    (broken, *_) = cards.cards["newly broken"]
    assert [broken.verdict(answer) for answer in (broken.example.before, broken.example.after)] == ["right", "other"]
    path = before_after_grid(gallery().examples, tmp_path / "grid.png", picture=picture)
    red = (200, 36, 46)  # of the written word, which only the badges of newly broken images share
    with Image.open(path) as page:
        header = np.asarray(page.convert("RGB"))[:150]
    assert not (header == red).all(axis=-1).any()
