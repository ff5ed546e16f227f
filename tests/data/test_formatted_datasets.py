"""A format of the user (torch, numpy, pandas, ...) changes nothing: images and texts are read without it."""

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, same, weights

from clip_po.candidates import CandidateTexts
from clip_po.concept.preferences import reverse_attribute
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.formats import read_row
from clip_po.data.images import is_transformed
from clip_po.data.pairs import PreferencePairs
from clip_po.data.streamed_pairs import StreamedPairs
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.evaluation.fairness.scores import read_attribute
from clip_po.evaluation.retrieval import read_captions
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.suites.suite import Entry, load_entry
from clip_po.evaluation.zero_shot import zero_shot_accuracy

ATTACK = TypographicAttack(CLASSES, min_side=32)
TEXTS = CandidateTexts(PROMPTS)
FORMATS = {
    **{kind: {"type": kind} for kind in ("torch", "numpy", "pandas", "arrow")},
    "some columns": {"type": None, "columns": ["label"]},
    "numpy, some columns": {"type": "numpy", "columns": ["label"]},
}


def with_palettes(dataset):
    """The same rows with palette images: under a format their pixels are positions in the palette."""
    columns = {name: list(dataset[name]) for name in dataset.column_names}
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            columns[name] = [image.quantize(8) for image in columns[name]]
    return datasets.Dataset.from_dict(columns, features=dataset.features)


def labelled():
    return with_palettes(make_labelled(4))


def classed():
    other = [(row + 1) % 4 for row in range(4)]
    feature = datasets.List(datasets.Value("int64"))
    return labelled().add_column("rejected_label", [[label] for label in other], feature=feature)


def typographic(dataset):
    return PreferencePairs(TypographicPreferences(dataset, ATTACK), "clean_image", TEXTS)


def streamed(stream):
    return StreamedPairs(TypographicStream(stream, ATTACK), 1, 4, ["sigmoid"], "clean_image", TEXTS)


NUMBERED = {
    "classes": lambda form: PreferencePairs(form(classed()), None, TEXTS),
    "regularization": lambda form: PreferencePairs(classed(), form(labelled()), TEXTS),
    "attack": lambda form: typographic(form(labelled())),
}


def equal(first, second):
    if isinstance(first, Image.Image):
        return isinstance(second, Image.Image) and first.tobytes() == second.tobytes()
    return type(first) is type(second) and first == second


def assert_same_rows(plain, formatted):
    for index in range(4):
        before, after = plain[index], formatted[index]
        assert before.keys() == after.keys()
        assert all(equal(before[name], after[name]) for name in before), index


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("make", NUMBERED.values(), ids=NUMBERED)
def test_rows_are_those_of_the_dataset_without_its_format(make, form):
    assert_same_rows(make(lambda dataset: dataset), make(lambda dataset: dataset.with_format(**form)))


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_texts_and_both_images_of_a_preference_are_read_without_a_format(kind):
    def pairs(rows):
        return PreferencePairs(rows, "clean_image", TEXTS, targets="clean_image")

    rows = with_palettes(make_preferences(4))
    assert_same_rows(pairs(rows), pairs(rows.with_format(kind)))
    assert read_row(rows.with_format(kind), 1, "train_dataset") == read_row(rows, 1, "train_dataset")
    assert pairs(rows).digest("image") == pairs(rows.with_format(kind)).digest("image")


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_streams_are_read_without_a_format(kind):
    def preferences(stream):
        return StreamedPairs(stream, 1, 4, ["sigmoid"], None, TEXTS)

    plain, formatted = (rows.to_iterable_dataset() for rows in (labelled(), labelled().with_format(kind)))
    assert_same_rows(streamed(plain), streamed(formatted))
    assert_same_rows(streamed(plain), streamed(plain.with_format(kind)))
    stream = classed().to_iterable_dataset()
    assert_same_rows(preferences(stream), preferences(stream.with_format(kind)))


CHANGES = {
    "map": lambda stream: stream.map(lambda row: row, features=stream.features),
    "filter": lambda stream: stream.filter(lambda row: True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_format_under_a_map_is_refused_and_no_image_is_blamed(kind, change):
    labels, texts = (rows(4).to_iterable_dataset().with_format(kind) for rows in (make_labelled, make_preferences))
    for pairs in (
        streamed(change(labels)),
        StreamedPairs(change(texts), 1, 4, ["sigmoid"], None, TEXTS, on_bad_image="skip"),
    ):
        with pytest.raises(TypeError, match=r"row 0 of the stream: column '\w+' holds a .*with_format\(None\)"):
            pairs[0]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_training_sees_the_colours_of_palette_images(kind, make_trainer):
    trained = []
    for rows in (classed(), classed().with_format(kind)):
        trainer = make_trainer(rows, reg_dataset=rows, eval_dataset=rows, max_steps=2, learning_rate=1e-3)
        trainer.train()
        trained.append((weights(trainer.model), trainer.evaluate()["eval_loss"]))
    assert same(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_evaluations_read_the_dataset_without_its_format(form, model, processor):
    rows = labelled().add_column("caption", [["a cat", "a dog"]] * 4)
    formatted = rows.with_format(**form)

    def drawn(dataset):
        return RobustnessImages(dataset, ATTACK, processor, cluster_column="label")

    for before, after in zip(drawn(rows), drawn(formatted), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    results = [zero_shot_accuracy(model, processor, found, ["a {}"], disable_tqdm=True) for found in (rows, formatted)]
    assert np.array_equal(results[0].predicted, results[1].predicted)
    assert np.array_equal(results[0].label, results[1].label)
    assert read_captions(formatted, "caption")[0] == read_captions(rows, "caption")[0]
    assert read_attribute(formatted, "label").tolist() == read_attribute(rows, "label").tolist()
    found = [reverse_attribute(part, "a {attribute}", "label")[0] for part in (rows, formatted)]
    assert found[0] == found[1]
    assert isinstance(found[1]["image"], Image.Image)


@pytest.mark.parametrize("class_names", [None, {"cat": "kitten"}, CLASSES])
@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_suite_reads_a_saved_dataset_without_the_format_saved_with_it(class_names, kind, tmp_path):
    labelled().with_format(kind).save_to_disk(str(tmp_path / "saved"))
    entry = Entry("own", str(tmp_path / "saved"), "labelled", ["a {}"], class_names, "-", None, split="train")
    entry = Entry(**{**vars(entry), "without": ["dog"] if class_names is None else []})
    found = load_entry(entry, None)
    assert len(found) == (3 if class_names is None else 4)
    assert isinstance(found[0]["image"], Image.Image)
    assert isinstance(found[0]["label"], int)


def test_a_transform_of_the_user_is_no_format():
    transformed = make_preferences(3).with_transform(lambda batch: batch)
    assert is_transformed(transformed)
    assert not is_transformed(make_preferences(3).with_format("torch"))
    flipped = make_preferences(3).with_transform(
        lambda batch: {**batch, "image": [image.transpose(Image.Transpose.ROTATE_90) for image in batch["image"]]}
    )
    plain = PreferencePairs(make_preferences(3), None, TEXTS)
    assert PreferencePairs(flipped, None, TEXTS)[1]["image"].tobytes() != plain[1]["image"].tobytes()
