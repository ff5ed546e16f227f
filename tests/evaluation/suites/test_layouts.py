import json

import datasets
import pytest
from PIL import Image

from clip_po.evaluation.suites.layouts import check_inside, load_annotation, load_columns, load_file_names


def save(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def rows(dataset):
    names = dataset.features["label"].names
    return [(names[label], word) for label, word in zip(dataset["label"], dataset["word"], strict=True)]


def test_file_names_say_what_is_shown_and_written(tmp_path):
    for name in (
        "label=dog_text=cat.png",
        "label=alarm clock_text=cell phone.JPG",
        "sub/label=traffic_light_text=cup_2.png",
        "sub/label=cup_text=dog (3).jpeg",
    ):
        save(tmp_path / name)
    # What macOS adds when it packs an archive.
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._label=dog_text=cat.png").write_bytes(b"")
    (tmp_path / "README.txt").write_text("licence")
    dataset = load_file_names(tmp_path)
    assert dataset.column_names == ["image", "label", "word"]
    assert set(rows(dataset)) == {
        ("dog", "cat"),
        ("alarm clock", "cell phone"),
        ("traffic light", "cup"),
        ("cup", "dog"),
    }
    assert len(dataset) == 4
    assert dataset.features["label"].names == ["alarm clock", "cat", "cell phone", "cup", "dog", "traffic light"]
    assert dataset[0]["image"].size == (8, 8)


def test_copies_in_hidden_folders_are_no_photographs(tmp_path):
    for name in (".ipynb_checkpoints/label=dog_text=cat-checkpoint.png", "label=dog_text=cat.png"):
        save(tmp_path / ".cache" / name)
    assert rows(load_file_names(tmp_path / ".cache")) == [("dog", "cat")]


def test_spellings_that_the_model_can_not_tell_apart_are_one_candidate(tmp_path):
    pairs = [("Dog", "light_bulb"), ("dog", "cat"), ("Light  Bulb", "DOG"), ("cat", "t-shirt_top")]
    for number, (label, word) in enumerate(pairs):
        save(tmp_path / f"{number}" / f"label={label}_text={word}.png")
    dataset = load_file_names(tmp_path)
    assert dataset.features["label"].names == ["DOG", "Light  Bulb", "cat", "t-shirt top"]
    assert rows(dataset) == [("DOG", "Light  Bulb"), ("DOG", "cat"), ("Light  Bulb", "DOG"), ("cat", "t-shirt top")]

    # A word in another spelling than its class is a candidate too, else nobody counts who is fooled by it.
    pinned = load_file_names(tmp_path, ["cat", "dog", "light bulb"])
    assert pinned.features["label"].names == ["cat", "dog", "light bulb"]
    assert rows(pinned) == [("dog", "light bulb"), ("dog", "cat"), ("light bulb", "dog"), ("cat", "t-shirt top")]


def test_a_broken_file_name_is_named(tmp_path):
    save(tmp_path / "label=dog_text=cat.png")
    save(tmp_path / "label=dog_txt=cat.png")
    with pytest.raises(ValueError, match=r"label=dog_txt=cat\.png"):
        load_file_names(tmp_path)


def test_a_pinned_candidate_set_is_kept_in_its_order_and_must_hold_every_label(tmp_path):
    save(tmp_path / "label=dog_text=cat.png")
    assert load_file_names(tmp_path, ["dog", "bird"]).features["label"].names == ["dog", "bird"]
    with pytest.raises(ValueError, match=r"label=dog_text=cat\.png"):
        load_file_names(tmp_path, ["cat", "bird"])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        load_file_names(tmp_path)


def annotate(folder, annotation, name="annotations.json"):
    for image in annotation:
        if ".." not in image:
            save(folder / "images" / image)
    (folder / name).write_text(json.dumps(annotation))


ANNOTATION = {
    "IMG_1.JPG": {"true object": "cup", "typographic attack label": "good"},
    "IMG_2.JPG": {"true object": "plant", "typographic attack label": ""},
}


@pytest.mark.parametrize("name", ["annotation.json", "annotations.json"])
@pytest.mark.parametrize("below", ["", "typographic_attack_dataset"])
def test_annotated_photographs(tmp_path, name, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    annotate(folder, ANNOTATION, name)
    dataset = load_annotation(tmp_path)
    assert rows(dataset) == [("cup", "good"), ("plant", "")]
    assert dataset.features["label"].names == ["cup", "good", "plant"]


def test_classes_of_the_authors_are_the_candidate_set(tmp_path):
    annotate(tmp_path, ANNOTATION)
    (tmp_path / "classes.json").write_text(json.dumps({"plant": 0, "cup": 1, "apple": 2}))
    assert load_annotation(tmp_path).features["label"].names == ["plant", "cup", "apple"]


def test_what_an_annotation_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"annotation\.json"):
        load_annotation(tmp_path)
    annotate(tmp_path, {**ANNOTATION, "IMG_3.JPG": {"true object": "cup"}})
    with pytest.raises(ValueError, match=r"IMG_3\.JPG"):
        load_annotation(tmp_path)
    annotate(tmp_path, ANNOTATION)
    (tmp_path / "images" / "IMG_2.JPG").unlink()
    with pytest.raises(ValueError, match=r"IMG_2\.JPG"):
        load_annotation(tmp_path)


def test_an_annotation_that_leaves_its_folder_is_refused(tmp_path):
    save(tmp_path / "secret.png")
    inside = tmp_path / "data"
    inside.mkdir()
    annotate(inside, {"../../secret.png": {"true object": "cup", "typographic attack label": "good"}})
    with pytest.raises(ValueError, match=r"\.\./\.\./secret.png.*outside"):
        load_annotation(inside)


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "\\\\host\\x.png"]
)
def test_paths_that_leave_are_refused_on_every_system(name):
    with pytest.raises(ValueError, match="outside"):
        check_inside(name, "annotation.json")


def test_paths_that_stay_are_taken():
    check_inside("sub/..x/IMG 1..png", "annotation.json")


@pytest.fixture
def scam(tmp_path):
    """As on the Hub: one split of images with metadata."""
    lines = ["file_name,type,object_label,attack_word"]
    for number, (kind, label, word) in enumerate(
        [("SCAM", "ball", "car"), ("NoSCAM", "ball", "car"), ("SCAM", "chair", "ball"), ("SynthSCAM", "chair", "car")]
    ):
        save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{kind},{label},{word}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


COLUMNS = {"label": "object_label", "word": "attack_word"}


def test_columns_of_one_kind_of_row(scam):
    dataset = load_columns(scam, columns=COLUMNS, where={"type": "SCAM"})
    assert rows(dataset) == [("ball", "car"), ("chair", "ball")]
    assert dataset.features["label"].names == ["ball", "car", "chair"]
    assert isinstance(dataset[1]["image"], Image.Image)


def test_class_label_columns_are_read_by_their_names(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": names, "word": names})
    images = [Image.new("RGB", (8, 8))] * 2
    table = datasets.Dataset.from_dict({"image": images, "label": [1, 0], "word": [0, 1]}, features=features)
    table.save_to_disk(tmp_path)
    assert rows(load_columns(tmp_path)) == [("dog", "cat"), ("cat", "dog")]


def test_rows_are_chosen_by_numbers_and_booleans_and_underscores_are_spaces(tmp_path):
    columns = {
        "image": [Image.new("RGB", (8, 8))] * 4,
        "label": ["light_bulb", "cat", "dog", "cup"],
        "word": ["cat", "light bulb", "cat", "cat"],
        "part": [1, 1, 2, 1],
        "kept": [True, True, True, False],
    }
    features = datasets.Features(
        {"image": datasets.Image(), **{k: datasets.Value("string") for k in ("label", "word")}}
    )
    features |= {"part": datasets.Value("int64"), "kept": datasets.Value("bool")}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    dataset = load_columns(tmp_path, where={"part": 1, "kept": True})
    assert rows(dataset) == [("light bulb", "cat"), ("cat", "light bulb")]
    assert dataset.features["label"].names == ["cat", "light bulb"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"where": {"type": "Scam"}}, "NoSCAM"),
        ({"where": {"kind": "SCAM"}}, "kind"),
        ({"columns": {"label": "object"}}, "object_label"),
        ({"class_names": ["ball"]}, "row 2.*chair"),
        ({"split": "test"}, "'test'"),
    ],
)
def test_columns_that_do_not_fit_are_named(scam, arguments, said):
    with pytest.raises(ValueError, match=said):
        load_columns(scam, **{"columns": COLUMNS, **arguments})


def test_metadata_that_leave_the_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "secret.png")
    save(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label,word\n../secret.png,cat,dog\n")
    with pytest.raises(Exception) as caught:
        load_columns(tmp_path / "data")
    assert "../secret.png" in f"{caught.value} {caught.value.__cause__}"
