"""The true class is never written on its own image, however it is spelled."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from samples import make_trainer, picture

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.words import spelling
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.evaluation.robustness import RobustnessImages

SPELLINGS = [
    ("polar_bear", "polar bear"),
    ("polar_bear", "Polar Bear"),
    ("polar_bear", "polar-bear"),
    ("polar bear", "POLAR_BEAR"),
    ("polar bear", "polar  bear"),
    ("cat", "cat "),
    ("cat", " Cat"),
    ("cat", "cat."),
    ("cat", "cat\u200b"),
    ("cat", "\uff43\uff41\uff54"),  # full width
    ("caf\u00e9", "cafe\u0301"),
    ("stra\u00dfe", "STRASSE"),
]


@pytest.mark.parametrize(("name", "word"), SPELLINGS)
def test_spellings_of_one_word_are_one(name, word):
    assert spelling(name) == spelling(word)


@pytest.mark.parametrize(("name", "word"), [("cat", "cats"), ("c", "c++"), ("bear", "polar bear"), ("?", "!")])
def test_other_words_stay_apart(name, word):
    assert spelling(name) != spelling(word)


def labelled(name, rows=40):
    features = Features({"image": Image(), "label": ClassLabel(names=[name, "ship"])})
    return Dataset.from_dict({"image": [picture(0)] * rows, "label": [0] * rows}, features=features)


def attack(word, **arguments):
    return TypographicAttack(words=[word, "dog", "ship"], min_side=32, **arguments)


@pytest.mark.parametrize(("name", "word"), SPELLINGS[:8])
@pytest.mark.parametrize("other", ["class-words", "other-words"])
def test_it_is_not_written_in_training_or_evaluation(other, name, word, processor):
    drawn = attack(word)
    if other == "other-words":
        drawn = TypographicAttack(
            words=["dog", "ship"], other_words=[word, "moon"], other_share=0.9, count=(1, 1), min_side=32
        )
    rows = labelled(name)
    preferences = TypographicPreferences(rows, drawn)
    in_training = {word for index in range(len(rows)) for word in preferences.words(0, index, 0)}
    in_evaluation = set(RobustnessImages(rows, drawn, processor).written)
    streamed = TypographicStream(rows.to_iterable_dataset(), drawn)
    in_stream = {word for index in range(len(rows)) for word in streamed.words(0, index, 0)}
    for written in (in_training, in_evaluation, in_stream):
        assert written
        assert {spelling(each) for each in written} <= {"dog", "ship", "moon"}


def test_a_word_names_its_class_in_any_spelling(processor):
    features = Features({"image": Image(), "label": ClassLabel(names=["polar_bear", "ship"])})
    rows = Dataset.from_dict({"image": [picture(0)] * 20, "label": [1] * 20}, features=features)
    images = RobustnessImages(rows, attack("Polar bear"), processor)
    assert {0} == set(images.word[images.written == "Polar bear"])


def test_the_text_of_a_word_is_that_of_its_class(clip_folder, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["polar_bear", "Ship"])})
    rows = Dataset.from_dict({"image": [picture(0)] * 8, "label": [0, 1] * 4}, features=features)
    drawn = TypographicAttack(words=["Polar bear", "ship", "dog", "DOG"], min_side=32)
    preferences = TypographicPreferences(rows, drawn, rejected="others")
    prompts = ["a photo of a polar bear", "a photo of a Ship", "a photo of a dog"]
    assert preferences.all_texts == prompts
    for index in range(8):
        texts = preferences.texts(index, 0)
        rejected = texts["rejected"]
        assert len(set(rejected)) == len(rejected)
        assert {texts["chosen"], *rejected} <= set(prompts)
    make_trainer(clip_folder, tmp_path, train_dataset=preferences, candidate_texts=preferences.all_texts)
