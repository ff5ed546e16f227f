from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from samples import CLASSES, make_labelled

from clip_po.evaluation.robustness import Answers
from clip_po.evaluation.suites.photographs import accuracy_report, ask_photographs, candidate_sets, mean_report
from clip_po.evaluation.suites.suite import MEASURES, Entry, entry_source, load_entry, load_suite, suite_names
from clip_po.evaluation.zero_shot import class_embeddings, classify, zero_shot_accuracy

ENTRY = {
    "name": "pets",
    "path": None,
    "layout": "labelled",
    "templates": ["a photo of a {}."],
    "class_names": None,
    "source": "Someone 2020",
    "license": None,
}


def test_the_suites_of_the_package_are_whole():
    assert suite_names() == ["fairness", "retention", "retrieval", "typographic"]
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == suite.measures == name
        assert {entry.layout for entry in suite.entries} <= MEASURES[name]
        for entry in suite.entries:
            assert entry.source
            assert all(template.count("{}") == 1 for template in entry.templates)
            assert entry.path is not None or entry.layout in ("file_names", "annotation")
            assert entry.verified or entry.note, f"{entry.name}: say what could not be verified"


def test_the_suite_of_the_benchmarks_loads():
    suite = load_suite(str(Path(__file__).parents[3] / "benchmarks" / "handwritten.yaml"))
    assert [(entry.name, entry.rows) for entry in suite.entries] == [
        ("rta-100", 1000),
        ("paint", 110),
        ("known", None),
    ]


def test_what_the_suites_hold():
    nine = ["caltech101", "oxford-pets", "stanford-cars", "flowers102", "food101", "fgvc-aircraft"]
    nine += ["dtd", "sun397", "eurosat"]
    retention = [entry.name for entry in load_suite("retention").entries]
    assert retention == [*nine, "imagenet-100"]
    typographic = load_suite("typographic").entries
    photographs = ["rta-100", "paint", "disentangling", "scam", "synth-scam", "no-scam"]
    assert [entry.name for entry in typographic] == [*photographs, *retention]
    # A figure without its candidate set means nothing: both published ones are given.
    assert all(set(entry.candidates) == {"all", "pair"} for entry in typographic[:6])
    assert [entry.variant for entry in typographic[3:6]] == ["typographic", "typographic", "clean"]


def write(folder, *entries, **others):
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"measures": "retention", "entries": list(entries), **others}))
    return str(file)


def test_a_suite_of_your_own_may_include_others(tmp_path):
    suite = load_suite(write(tmp_path, ENTRY, include=["retention"]))
    assert (suite.name, suite.entries[0].name, len(suite.entries)) == ("mine", "pets", 11)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"templates": ["a photo"]}, r"templates\[0\] must contain exactly one '\{\}'.*got 'a photo'"),
        ({"templates": "a {}"}, "templates must be a list"),
        ({"layout": "captioned"}, "layout 'captioned'"),
        ({"name": "../pets"}, "not a valid name"),
        ({"folder": "a/../.."}, "not a valid name"),
        ({"folder": ["a", "../b"]}, r"'\.\./b' is not a valid name"),
        ({"candidates": ["two"]}, "candidates"),
        ({"variant": "blurred"}, "variant"),
        ({"class_names": "cat"}, "class_names must be"),
        ({"tempaltes": ["{}"]}, "tempaltes"),
        # What the layout would not read.
        ({"candidates": ["labels"]}, "'labelled' does not read candidates, got \\['labels'\\]"),
        ({"where": {"type": "a"}}, "'labelled' does not read where"),
        ({"layout": "file_names", "without": ["cat"]}, "'file_names' does not read without"),
        ({"layout": "file_names", "class_names": {"cat": "big cat"}}, "class_names must be a list or null"),
    ],
)
def test_an_entry_that_can_not_work_is_refused(tmp_path, entry, said):
    with pytest.raises(ValueError, match=said):
        load_suite(write(tmp_path, {**ENTRY, **entry}))


@pytest.mark.parametrize("key", ENTRY)
def test_an_entry_needs_its_keys(tmp_path, key):
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
        load_suite(write(tmp_path, {name: value for name, value in ENTRY.items() if name != key}))


def test_suites_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="retention"):
        load_suite("retenion")
    with pytest.raises(ValueError, match="different names"):
        load_suite(write(tmp_path, ENTRY, ENTRY))
    with pytest.raises(ValueError, match="measures"):
        load_suite(write(tmp_path, ENTRY, measures="speed"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="measures and entries"):
        load_suite(str(tmp_path / "list.yaml"))


def test_an_entry_that_is_nowhere_says_where_it_comes_from(tmp_path):
    entry = Entry(**{**ENTRY, "layout": "file_names"})
    with pytest.raises(ValueError, match=r"Someone 2020.*DIR/pets"):
        entry_source(entry, None)
    with pytest.raises(ValueError, match=r"no folder .*/pets"):
        entry_source(entry, tmp_path)


# Files as the public repository has them: folder, label and word of each photograph.
PUBLISHED = {
    "rta-100": {
        "rta100/label=DVD_text=hair dryer.jpg": ("DVD", "hair dryer"),
        "rta100/label=hair dryer_text=iPad.jpg": ("hair dryer", "iPad"),
        "rta100/label=t-shirt_text=DVD.jpg": ("t-shirt", "DVD"),
    },
    "paint": {
        "typographic_real_data_from_PAINT/typographic_attacks/label=glove_text=garlic.jpeg": ("glove", "garlic"),
        "typographic_real_data_from_PAINT/typographic_attacks/label=gpu_text=cpu.png": ("gpu", "cpu"),
        "typographic_real_data_from_PAINT/typographic_attacks/label=light bulb_text=pot.jpg": ("light bulb", "pot"),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_photographs_load_from_the_folders_in_which_they_are_published(tmp_path, name):
    for file in (file for files in PUBLISHED.values() for file in files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA" if file.endswith("png") else "RGB", (8, 8)).save(tmp_path / file)
    entry = next(entry for entry in load_suite("typographic").entries if entry.name == name)
    dataset = load_entry(entry, tmp_path)
    names = dataset.features["label"].names
    shown = [names[label] for label in dataset["label"]]
    assert list(zip(shown, dataset["word"], strict=True)) == list(PUBLISHED[name].values())
    assert names == sorted({text for pair in PUBLISHED[name].values() for text in pair})
    assert candidate_sets(dataset, ["all"])["all"] == tuple(names)


def test_the_first_folder_of_an_entry_that_exists_is_used(tmp_path):
    entry = Entry(**{**ENTRY, "layout": "file_names", "folder": ["pets", "pets-v2"]})
    with pytest.raises(ValueError, match=r"no folder .*/pets or .*/pets-v2\. .*DIR/pets and"):
        entry_source(entry, tmp_path)
    for name in ("pets-v2", "pets"):
        (tmp_path / name).mkdir()
        assert entry_source(entry, tmp_path) == str(tmp_path / name)
    assert Entry(**ENTRY).folders == ["pets"]


@pytest.fixture
def pets(tmp_path):
    images = [Image.new("RGB", (8, 8))] * 4
    label = datasets.ClassLabel(names=["Big_cat, felid", "dog", "Background", "sea_horse"])
    features = datasets.Features({"picture": datasets.Image(), "kind": label})
    table = datasets.Dataset.from_dict({"picture": images, "kind": [3, 2, 0, 1]}, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "pets")
    return tmp_path


COLUMNS = {"columns": {"image": "picture", "label": "kind"}}


def test_names_of_a_labelled_entry_become_readable(pets):
    better = {"class_names": {"DOG": "hound"}, "name_until": ",", "without": ["background"]}
    dataset = load_entry(Entry(**{**ENTRY, **COLUMNS, **better}), pets)
    assert dataset.column_names == ["image", "label"]
    assert dataset.features["label"].names == ["Big cat", "hound", "sea horse"]
    assert dataset["label"][:] == [2, 0, 1]


def test_names_of_a_labelled_entry_may_be_given_in_order(pets):
    names = ["tiger", "dog", "nothing", "sea horse"]
    dataset = load_entry(Entry(**{**ENTRY, **COLUMNS, "class_names": names}), pets)
    assert dataset.features["label"].names == names


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"class_names": {"wolf": "grey wolf"}}, "wolf"),
        ({"without": ["wolf"]}, "wolf"),
        ({"class_names": ["a", "b"]}, "4 classes"),
        ({"columns": {"image": "picture"}}, "no column 'label'"),
        ({"split": "train"}, "train"),
    ],
)
def test_a_labelled_entry_that_does_not_fit_its_data_is_refused(pets, entry, said):
    with pytest.raises(ValueError, match=said):
        load_entry(Entry(**{**ENTRY, **COLUMNS, **entry}), pets)


@pytest.mark.parametrize("kind", ["string", "large_string"])  # pandas writes the second one
def test_labels_that_are_texts_become_classes(tmp_path, kind):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    images = [Image.new("RGB", (8, 8))] * 2
    table = datasets.Dataset.from_dict({"image": images, "label": ["dog", "cat"]}, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "pets")
    dataset = load_entry(Entry(**ENTRY), tmp_path)
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [1, 0]


def test_labels_that_are_lists_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    columns = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [[0], [1]]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"Row 0: column 'label' is \[0\]"):
        load_entry(Entry(**{**ENTRY, "split": "train", "class_names": ["cat", "dog"]}), tmp_path)


@pytest.fixture
def photographs():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]
    label = datasets.ClassLabel(names=["bird", "car", "cat", "dog", "tree"])
    features = datasets.Features({"image": datasets.Image(), "label": label, "word": datasets.Value("string")})
    columns = {
        "image": images,
        "label": [2, 3, 0] * 4,
        "word": ["dog", "house", "car"] * 4,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_candidate_sets(photographs):
    sets = candidate_sets(photographs, ["all", "labels", "pair"])
    assert sets["all"] == ("bird", "car", "cat", "dog", "tree")
    assert sets["labels"] == ("bird", "cat", "dog")
    assert sets["pair"] == ("bird", "car", "cat", "dog", "house")


def test_models_answer_among_each_candidate_set(model, other_model, processor, photographs):
    models, templates = {"a": model, "b": other_model}, ["a photo of a {}", "the {}"]
    sets = candidate_sets(photographs, ["all", "labels", "pair"])
    found = ask_photographs(models, processor, photographs, sets, templates, batch_size=5, disable_tqdm=True)
    texts = found["all"].class_names
    pixels = processor(images=list(photographs["image"]), return_tensors="pt")["pixel_values"]
    for name, asked in models.items():
        logits = classify(asked, pixels, class_embeddings(asked, processor, texts, templates)).detach().numpy()
        for kind in ("all", "labels"):
            columns = [texts.index(text) for text in sets[kind]]
            expected = [texts[columns[best]] for best in logits[:, columns].argmax(axis=1)]
            assert [texts[answer] for answer in found[kind].predicted[name]["typographic"]] == expected
        for row, answer in enumerate(found["pair"].predicted[name]["typographic"]):
            label, word = ["cat", "dog", "bird"][row % 3], ["dog", "house", "car"][row % 3]
            pair = [texts.index(label), texts.index(word)]
            assert answer == pair[logits[row, pair].argmax()]
    # "house" is a candidate of its pair alone.
    assert (found["all"].word[1], found["labels"].word[2]) == (-1, -1)
    assert texts[found["pair"].word[1]] == "house"


def test_of_a_pair_equally_near_the_word_is_answered(model, processor, photographs):
    # One black image and prompts that the tokenizer cuts to the same tokens: no candidate is nearer.
    pair = {"pair": candidate_sets(photographs, ["pair"])["pair"]}
    templates = ["a " * 40 + "{}"]
    found = ask_photographs({"a": model}, processor, photographs, pair, templates, disable_tqdm=True)["pair"]
    assert (found.predicted["a"]["typographic"] == found.word).all()


def test_clean_answers_are_those_of_zero_shot_accuracy(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    labelled, templates = make_labelled(16), ["a photo of a {}"]
    found = ask_photographs(
        {"a": model}, processor, labelled, {"all": CLASSES}, templates, variant="clean", disable_tqdm=True
    )["all"]
    expected = zero_shot_accuracy(model, processor, labelled, templates, disable_tqdm=True)
    assert found.predicted["a"]["clean"].tolist() == expected.predicted.tolist()
    report = accuracy_report(found, "a", variant="clean")
    assert report == {"clean_accuracy": expected.accuracy}


def answers(label, word, variant="typographic", **predicted):
    number = len(label)
    return Answers(
        ("a", "b", "c"),
        np.array(label),
        np.array(word),
        np.array([""] * number),
        np.arange(number),
        {model: {variant: np.array(got)} for model, got in predicted.items()},
    )


def test_accuracy_and_fooled_by_hand():
    # The third word is no candidate, the fourth names the object itself: neither can fool.
    found = answers([0, 0, 0, 0], [1, 1, -1, 0], base=[1, 1, 1, 0], aligned=[0, 1, 0, 0])
    report = accuracy_report(found, "aligned", "base")
    assert report["typographic_accuracy"].value == 0.75
    assert report["fooled"].value == 0.5
    assert report["difference"].value == 50
    assert "difference" not in accuracy_report(found, "base", "base")
    assert accuracy_report(found, "base")["fooled"].value == 1


def test_each_data_set_counts_once_in_the_mean():
    small = answers([0] * 8, [-1] * 8, "clean", base=[1] * 8, aligned=[0] * 8)
    large = answers([0] * 24, [-1] * 24, "clean", base=[0] * 24, aligned=[0] * 12 + [1] * 12)
    report = mean_report([small, large], "aligned", "base")
    assert report["mean_accuracy"].value == pytest.approx(0.75)
    assert report["mean_difference"].value == pytest.approx(100 * (0.75 - 0.5))
    assert report["mean_difference"].low < 25 < report["mean_difference"].high
