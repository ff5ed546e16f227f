"""The checkpoint's class names are taken for its own classes only, in the order of the dataset."""

import json

import datasets
import pytest
from samples import CLASSES, picture

from clip_po.cli.arguments import Task, TaskArguments
from clip_po.cli.main import main

TEMPLATE = "a photo of a {}"


def labelled(names, rows=8):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    columns = {"image": [picture(i) for i in range(rows)], "label": [i % len(names) for i in range(rows)]}
    return datasets.Dataset.from_dict(columns, features=features)


def arguments(**given):
    return TaskArguments(dataset_name="photos", **given)


@pytest.mark.parametrize(
    ("aligned_on", "known", "found"),
    [
        (["car", "ship", "truck"], ["bird", "cat", "dog"], ["bird", "cat", "dog"]),
        (["car", "ship", "truck"], ["truck", "car", "ship"], ["truck", "car", "ship"]),
        (["polar bear", "Cat"], ["cat", "polar_bear"], ["Cat", "polar bear"]),
        (["car", "ship", "truck"], ["ship", "car"], ["ship", "car"]),
        (["car", "ship"], ["ship", "car", "truck"], ["ship", "car", "truck"]),
        (["car", "ship", "truck"], ["car", "ship", "lorry"], ["car", "ship", "lorry"]),
    ],
)
def test_names_come_in_the_order_of_the_dataset(aligned_on, known, found):
    assert arguments().names(labelled(known), Task(aligned_on, TEMPLATE)) == found


def test_other_classes_are_said(caplog):
    arguments().names(labelled(["bird", "cat"]), Task(["car", "ship"], TEMPLATE))
    assert "aligned on the classes ['car', 'ship']. 'photos' has others, ['bird', 'cat']" in caplog.text


def test_renamed_classes_are_known_again():
    task = Task.of(["tench", "goldfish"], TEMPLATE, ["n01440764", "n01443537"])
    assert task.dataset_names == ["n01440764", "n01443537"]
    assert arguments().names(labelled(["n01443537", "n01440764"]), task) == ["goldfish", "tench"]
    assert arguments().names(labelled(["goldfish", "tench"]), task) == ["goldfish", "tench"]
    assert Task.of(["polar bear"], TEMPLATE, ["polar_bear"]).dataset_names is None


def test_what_the_user_names_comes_first(tmp_path):
    task = Task(["car", "ship"], TEMPLATE)
    assert arguments(class_names=["a", "b"]).names(labelled(["car", "ship"]), task) == ["a", "b"]
    file = tmp_path / "names.yaml"
    file.write_text("car: automobile")
    assert arguments(class_name_map=str(file)).names(labelled(["car", "ship"]), task) == ["automobile", "ship"]


def test_labels_without_names_take_the_checkpoints():
    rows = labelled(["car", "ship"]).cast_column("label", datasets.Value("int64"))
    assert arguments().names(rows, Task(["car", "ship"], TEMPLATE)) == ["car", "ship"]


def test_a_task_is_read_as_it_was_written(tmp_path):
    task = Task.of(["tench"], TEMPLATE, ["n01440764"])
    task.save(tmp_path)
    assert Task.load(tmp_path) == task
    (tmp_path / "clip_po_task.json").write_text(json.dumps({"class_names": ["a"], "prompt_template": "{}"}))
    assert Task.load(tmp_path) == Task(["a"], "{}")


@pytest.mark.parametrize("names", [sorted(CLASSES), ["lion", "tiger", "wolf", "fox"]], ids=["order", "others"])
def test_evaluate_measures_with_the_datasets_classes(names, clip_folder, processor, tmp_path):
    folder, model, out = tmp_path / "data", tmp_path / "model", tmp_path / "out"
    labelled(names).to_parquet(folder / "test-00000-of-00001.parquet")
    model.mkdir()
    for file in clip_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    Task(CLASSES, TEMPLATE).save(model)
    data = ["--dataset_name", str(folder), "--output_dir", str(out)]
    assert main(["evaluate", "--model_name_or_path", str(model), *data]) == 0
    reports = [json.loads(file.read_text()) for file in out.rglob("report.json")]
    assert [report["data"]["class_names"] for report in reports] == [names]


def test_other_splits_get_the_classes_of_the_training_split(tmp_path):
    labelled(["bird", "cat", "polar_bear"], rows=6).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    labelled(["polar bear", "cat"], rows=4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    args = TaskArguments(dataset_name=str(tmp_path))
    train = args.load("train", 0)
    test = args.load("test", 0, like=train)
    assert args.names(test) == args.names(train) == ["bird", "cat", "polar bear"]
    assert test["label"][:] == [2, 1, 2, 1]


def test_a_class_that_the_training_split_lacks_is_refused(tmp_path):
    labelled(["bird", "cat"]).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    labelled(["bird", "fox"]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    args = TaskArguments(dataset_name=str(tmp_path))
    with pytest.raises(ValueError, match=r"split 'test' has the classes \['fox'\], which the training split"):
        args.load("test", 0, like=args.load("train", 0))


def test_evaluate_takes_names_that_stand_for_two_classes(clip_folder, tmp_path, capsys):
    folder, out = tmp_path / "data", tmp_path / "out"
    rows = labelled(["a", "b", "c"]).cast_column("label", datasets.Value("int64"))
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    data = ["--dataset_name", str(folder), "--output_dir", str(out), "--class_names", "missile", "ship", "missile"]
    assert main(["evaluate", "--model_name_or_path", str(clip_folder), *data]) == 0
    reports = [json.loads(file.read_text()) for file in out.rglob("report.json")]
    assert reports[0]["data"]["class_names"] == ["missile", "ship", "missile"]
