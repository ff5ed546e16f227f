"""What --retention names is loaded, or refused with a reason, before anything is measured."""

import datasets
import pytest
import yaml
from samples import CLASSES, make_labelled, picture, write_parquet

from clip_po.cli.retention_sets import labelled_sets, load_retention_sets

TEMPLATES = ["an image of a {}"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("sets"), train=8, validation=6, test=4)


@pytest.mark.parametrize(
    ("end", "split", "rows"), [("", "test", 4), (":train", "train", 8), (":test[:3]", "test[:3]", 3)]
)
def test_a_folder_with_and_without_a_split(parquet, end, split, rows):
    (found,) = load_retention_sets([f"{parquet}{end}"], TEMPLATES).values()
    assert (found.source, found.split, len(found.dataset), found.image_column) == (str(parquet), split, rows, "image")
    assert (found.labelled.templates, found.labelled.label_column) == (TEMPLATES, "label")
    assert found.labelled.dataset is found.dataset


def test_a_folder_of_classes_without_splits_and_a_single_name(tmp_path):
    for number, name in enumerate(["polar_bear", "dog", "dog"]):
        (tmp_path / name).mkdir(exist_ok=True)
        picture(number).save(tmp_path / name / f"{number}.png")
    found = load_retention_sets(str(tmp_path), TEMPLATES)[tmp_path.name]
    assert (found.split, len(found.dataset)) == ("train", 3)
    assert found.answers({}).class_names == ("dog", "polar bear")


@pytest.mark.parametrize(("splits", "expected"), [(["train", "validation"], "validation"), (["train"], "train")])
def test_the_split_that_there_is(tmp_path, splits, expected):
    write_parquet(tmp_path, **dict.fromkeys(splits, 4))
    assert load_retention_sets([str(tmp_path)], TEMPLATES)[tmp_path.name].split == expected


def test_images_without_labels_and_with_several_are_for_drift_alone(tmp_path, caplog):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    faces = make_labelled(4).rename_column("label", "age").add_column("race", [0, 1, 0, 1])
    faces = faces.cast_column("race", datasets.ClassLabel(names=["a", "b"]))
    (tmp_path / "faces").mkdir()
    faces.to_parquet(tmp_path / "faces" / "test.parquet")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        picture(number).save(pictures / f"{number}.png")
    sets = load_retention_sets([str(pictures), str(tmp_path / "faces")], TEMPLATES)
    assert {name: len(loaded.dataset) for name, loaded in sets.items()} == {"pictures": 3, "faces": 4}
    assert labelled_sets(sets) == {}
    assert "no classes with names" in caplog.text
    assert "2 columns of classes (age, race), so only drift is measured" in caplog.text


def test_labels_of_texts_and_columns_of_other_names(tmp_path):
    rows = make_labelled(4)
    texts = [CLASSES[label] for label in rows["label"]]
    rows.remove_columns("label").add_column("label", texts).to_parquet(tmp_path / "texts.parquet")
    rows.rename_columns({"image": "photo", "label": "what"}).to_parquet(tmp_path / "named.parquet")
    sets = labelled_sets(load_retention_sets([f"{tmp_path}/texts.parquet", f"{tmp_path}/named.parquet"], TEMPLATES))
    assert sets["texts"].dataset.features["label"].names == sorted(CLASSES)
    assert (sets["named"].image_column, sets["named"].label_column) == ("photo", "what")


def test_entries_of_the_suite_by_name_and_in_a_file_of_your_own(tmp_path):
    for name in ("dtd", "mine"):
        datasets.DatasetDict({"test": make_labelled(4)}).save_to_disk(tmp_path / name)
    entry = {"name": "mine", "path": None, "layout": "labelled", "templates": ["my {}"], "class_names": None}
    suite = {"measures": "retention", "entries": [{**entry, "source": "me", "license": None}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(suite))
    sets = labelled_sets(load_retention_sets(["dtd", str(tmp_path / "own.yaml")], TEMPLATES, tmp_path))
    assert {name: list(known.templates) for name, known in sets.items()} == {"dtd": ["{} texture."], "mine": ["my {}"]}


def test_a_sample_of_a_set(parquet):
    (found,) = load_retention_sets([str(parquet)], TEMPLATES).values()
    assert found.sample(4, seed=0) is found
    few = found.sample(2, seed=0)
    assert len(few.dataset) == len(few.labelled.dataset) == 2
    assert few.dataset["label"] == found.dataset.shuffle(seed=0).select(range(2))["label"]


def broken_label(folder):
    rows = make_labelled(4)
    values = [0, 1, -1, 2]
    rows = rows.remove_columns("label").add_column("label", values, feature=rows.features["label"])
    rows.to_parquet(folder / "test.parquet")
    return folder


def test_what_can_not_be_loaded_says_which_and_what_to_do(tmp_path, parquet):
    def refused(*names, **arguments):
        with pytest.raises(ValueError) as error:
            load_retention_sets(list(map(str, names)), TEMPLATES, **arguments)
        return str(error.value)

    assert "--retention 'no/such' can't be loaded" in refused(parquet, "no/such")
    assert "or one of caltech101, oxford-pets" in refused("no/such")
    assert "'dev2'" in refused(f"{parquet}:dev2")
    assert "Row 2: column 'label' is -1" in refused(broken_label(tmp_path))
    assert "the set 'dtd' can't be loaded" in refused("dtd")
    assert "two sets of the name" in refused(parquet, f"{parquet}:train")
    (tmp_path / "faces.yaml").write_text("measures: fairness\nentries: []\ninclude: [fairness]\n")
    assert "measures 'fairness', not 'retention'" in refused(tmp_path / "faces.yaml")
    datasets.Dataset.from_dict({"label": ["a"]}).to_parquet(tmp_path / "texts.parquet")
    assert "no column 'image'" in refused(tmp_path / "texts.parquet")
