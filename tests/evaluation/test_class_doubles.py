"""A text that stands for two classes: evaluation counts each class by its position, training refuses."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from samples import CLASSES, make_labelled, picture

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.evaluation.class_doubles import first_alike, spaced_apart, unique_keys
from clip_po.evaluation.pseudo_labelling import pseudo_labels
from clip_po.evaluation.retrieval import evaluate_retrieval
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness
from clip_po.evaluation.suites.photographs import ask_photographs
from clip_po.evaluation.suites.suite import Entry, load_entry
from clip_po.evaluation.zero_shot import class_embeddings, zero_shot_accuracy

TEMPLATES = ["a photo of a {}", "a {}"]


def numbers(rows=40, classes=300):
    features = Features({"image": Image(), "label": Value("int64")})
    images = [picture(i) for i in range(rows)]
    return Dataset.from_dict({"image": images, "label": [i % classes for i in range(rows)]}, features=features)


def letters(number):
    return "".join(chr(ord("a") + number // 26**place % 26) for place in range(3))


@pytest.fixture
def names():
    """300 names, so that texts are encoded in several batches, each of them twice and once more in upper case."""
    unique = [letters(number * 7) for number in range(100)]
    return [*unique, *reversed(unique), *(name.upper() for name in unique)]


def test_the_embeddings_of_doubles_are_the_same_bit_for_bit(names, model, processor):
    embeds = class_embeddings(model, processor, names, TEMPLATES)
    assert torch.equal(embeds[:100], embeds[100:200].flip(0))
    assert torch.equal(embeds[:100], embeds[200:])
    assert torch.equal(first_alike(embeds), torch.tensor([*range(100), *reversed(range(100)), *range(100)]))


def test_a_tie_goes_to_the_first_class_as_published_code_has_it(names, model, processor):
    result = zero_shot_accuracy(model, processor, numbers(), TEMPLATES, names, batch_size=7, disable_tqdm=True)
    alone = zero_shot_accuracy(
        model, processor, numbers(), TEMPLATES, [*names[:100], *["z"] * 200], batch_size=7, disable_tqdm=True
    )
    assert set(result.predicted) <= set(range(100))
    assert np.array_equal(result.predicted[alone.predicted < 100], alone.predicted[alone.predicted < 100])
    assert len(result.per_class) == 300
    assert list(result.per_class)[100] == f"{names[100]} (class 100)"


DOUBLED = ["missile", "crane", "Missile", "ship"]


def with_robustness(model, processor):
    rows = make_labelled(4).cast_column("label", Value("int64"))
    images = RobustnessImages(rows, TypographicAttack(words=["cat", "dog"], min_side=32), processor, DOUBLED)
    evaluate_robustness({"base": model, "aligned": model}, images, TEMPLATES, disable_tqdm=True)


def with_zero_shot(model, processor):
    rows = make_labelled(4).cast_column("label", Value("int64"))
    zero_shot_accuracy(model, processor, rows, TEMPLATES, DOUBLED, disable_tqdm=True)


def with_embeddings(model, processor):
    class_embeddings(model, processor, DOUBLED, TEMPLATES)


@pytest.mark.parametrize("use", [with_robustness, with_zero_shot, with_embeddings])
def test_an_evaluation_says_doubles_once(use, model, processor, caplog):
    use(model, processor)
    said = [record.message for record in caplog.records if "stand for several classes" in record.message]
    assert len(said) == 1
    assert "'missile' for the classes [0, 2]" in said[0]


@pytest.mark.parametrize("use", ["classes", "captions"])
def test_an_evaluation_counts_cut_texts_once(use, model, processor, labelled, caplog):
    long = "a" + " a" * 40
    if use == "classes":
        class_embeddings(model, processor, [f"b {long}", f"c {long}", "dog"], ["{}"])
    else:
        rows = labelled.add_column("caption", [f"b {long}", f"c {long}", *["a dog"] * 14])
        evaluate_retrieval({"base": model, "aligned": model}, processor, rows, disable_tqdm=True)
    said = [record.message for record in caplog.records if "tokens that the model reads" in record.message]
    assert len(said) == 1
    assert said[0].startswith("2 texts of the")


def test_names_of_their_own_are_not_spoken_of(model, processor, caplog):
    class_embeddings(model, processor, CLASSES, TEMPLATES)
    assert not caplog.records


def test_robustness_counts_doubles_by_position(model, processor):
    rows = make_labelled(12).cast_column("label", Value("int64"))
    doubled = ["cat", "dog", "cat", "dog"]
    attack = TypographicAttack(words=["cat", "dog", "ship"], min_side=32)
    images = RobustnessImages(rows, attack, processor, doubled)
    answers = evaluate_robustness({"a": model}, images, TEMPLATES, disable_tqdm=True)
    for predicted in answers.predicted["a"].values():
        assert set(predicted) <= {0, 1}
    assert set(images.word) <= {-1, 0, 1}
    true_names = np.array(doubled)[images.label]
    assert (true_names != images.written).all()  # the word of a double is not written on its other class


@pytest.fixture
def missiles(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["missile, rocket", "missile, shot", "ship"])})
    table = Dataset.from_dict({"image": [picture(i) for i in range(6)], "label": [0, 1, 2] * 2}, features=features)
    table.to_parquet(tmp_path / "arms" / "test-00000-of-00001.parquet")
    return tmp_path


def test_a_suite_takes_doubles(missiles, model, processor):
    entry = {"name": "arms", "path": None, "layout": "labelled", "templates": TEMPLATES, "source": "", "license": None}
    for given in ({"class_names": None, "name_until": ","}, {"class_names": ["missile", "missile", "ship"]}):
        rows = load_entry(Entry(**{**entry, **given}), missiles)
        names = rows.features["label"].names
        assert [name.strip() for name in names] == ["missile", "missile", "ship"]
        answers = ask_photographs(
            {"a": model}, processor, rows, {"all": names}, TEMPLATES, variant="clean", disable_tqdm=True
        )["all"]
        assert answers.label.tolist() == [0, 1, 2] * 2
        assert set(answers.predicted["a"]["clean"]) <= {0, 2}


def test_names_are_told_apart_as_keys_and_as_labels():
    assert unique_keys(["a", "b", "a"]) == ["a", "b", "a (class 2)"]
    assert spaced_apart(["a", "b", "a", "a"]) == ["a", "b", "a ", "a  "]


@pytest.mark.parametrize("doubled", [["cat", "dog", "cat", "ship"], ["cat", "dog", "Cat", "ship"]])
def test_training_refuses_doubles(doubled, model, processor):
    rows = make_labelled(8).cast_column("label", Value("int64"))
    attack = TypographicAttack(words=["one", "two"], min_side=32)
    calls = [
        lambda: TypographicPreferences(rows, attack, doubled),
        lambda: TypographicStream(rows.to_iterable_dataset(), attack, doubled),
        lambda: pseudo_labels(model, processor, rows, doubled, TEMPLATES, disable_tqdm=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"for the classes \[0, 2\].*Rename these classes"):
            call()
