"""Tables of images: metadata beside them, lists of paths, and bytes, with classes as words."""

import io
import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import picture

from clip_po.data.class_labels import encode_labels, read_labels
from clip_po.data.loading import load_split

ROWS = [("a/0.png", "dog"), ("a/1.png", "cat"), ("b/2.png", "dog")]


def save(folder):
    for number, (name, _) in enumerate(ROWS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def write(file, column="image"):
    """Write paths and classes in the format of a file's extension."""
    rows = [{column: name, "label": label} for name, label in ROWS]
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        pd.DataFrame(rows).to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    return file


def check(rows):
    rows = encode_labels(rows, "label")
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows["label"][:] == [1, 0, 1]
    for number, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(picture(number)))


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["image", "file_name"])
def test_a_single_file_is_a_data_set_with_paths_relative_to_it(tmp_path, monkeypatch, kind, column):
    file = write(save(tmp_path) / f"pictures{kind}", column)
    monkeypatch.chdir("/")
    check(load_split(str(file), "train"))
    assert len(load_split(str(file), "train[:2]")) == 2
    with pytest.raises(ValueError, match="no split 'test'"):
        load_split(str(file), "test")


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_metadata_beside_images_say_their_classes(tmp_path, kind):
    for split in ("train", "test"):
        write(save(tmp_path / split) / f"metadata{kind}", "file_name")
        check(load_split(str(tmp_path), split))
    check(load_split(str(tmp_path / "train"), "train"))


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_tables_named_after_splits_are_those_splits(tmp_path, kind):
    for name in ("train", "val-00000-of-00001", "my_test_set"):
        write(save(tmp_path) / f"{name}{kind}")
    for split in ("train", "validation", "test"):
        check(load_split(str(tmp_path), split))
    (tmp_path / "classes.json").write_text("{}")
    check(load_split(str(tmp_path), "train"))


def test_a_table_with_two_splits_in_its_name_is_refused(tmp_path):
    write(save(tmp_path) / "train_test.csv")
    with pytest.raises(ValueError, match="'train' and 'test': it is not clear"):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_bytes_that_pandas_wrote_are_images(tmp_path, wrap):
    rows = [{"picture": wrap(png(number)), "label": label} for number, (_, label) in enumerate(ROWS)]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    check(load_split(str(tmp_path), "train", image_column="picture").rename_column("picture", "image"))


@pytest.mark.parametrize("named", ["../secret.png", "/etc/hostname", "https://example.com/x.png"])
def test_paths_out_of_the_folder_are_refused(tmp_path, named):
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text(f"image,label\n{named},cat\n")
    with pytest.raises(ValueError, match="outside the dataset folder"):
        load_split(str(tmp_path / "data" / "rows.csv"), "train")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "rows.csv").write_text("image,label\n0.png,cat\n")
    with pytest.raises(ValueError, match="outside the dataset folder"):
        load_split(str(tmp_path / "data" / "rows.csv"), "train")


def test_images_that_are_all_elsewhere_are_said_before_training(tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\na.png,cat\nb.png,dog\n")
    with pytest.raises(ValueError, match=r"None of the 2 images .* exists, such as .*a\.png"):
        load_split(str(tmp_path / "rows.csv"), "train")


def test_words_become_the_numbers_of_given_classes():
    rows = datasets.Dataset.from_dict({"label": ["polar_bear", "cat", "polar bear"]})
    encoded = encode_labels(rows, "label", ["cat", "dog", "polar bear"])
    assert encoded["label"][:] == [2, 0, 2]
    with pytest.raises(ValueError, match="Row 0: column 'label' is 'polar_bear', which is not one of the 2 classes"):
        encode_labels(rows, "label", ["cat", "dog"])
    with pytest.raises(ValueError, match="Row 1: column 'label' is None"):
        encode_labels(datasets.Dataset.from_dict({"label": ["cat", None]}), "label")


def test_the_names_of_folders_are_read_as_words_and_wordnet_ids_are_not():
    def names(*given):
        feature = datasets.Features({"label": datasets.ClassLabel(names=list(given))})
        return read_labels(datasets.Dataset.from_dict({"label": [0]}, features=feature), "label", None)[0]

    assert names("golden_retriever", "cat") == ("golden retriever", "cat")
    with pytest.raises(ValueError, match=r"WordNet ids \(n02099601.*--class_name_map"):
        names("n02099601", "n01443537")
    assert names("polar_bear", "polar bear") == ("polar bear", "polar bear")  # which training refuses


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_images_of_pairs_are_read_by_their_paths(tmp_path, kind):
    save(tmp_path)
    rows = [{"text": "a dog", "chosen_image": ROWS[0][0], "rejected_image": [ROWS[1][0], ROWS[2][0]]}]
    if kind == ".csv":
        rows[0]["rejected_image"] = ROWS[1][0]
        pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    elif kind == ".jsonl":
        (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]))
    else:
        pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")
    (row,) = load_split(str(tmp_path / f"pairs{kind}"), "train")
    rejected = row["rejected_image"] if kind != ".csv" else [row["rejected_image"]]
    for number, image in enumerate([row["chosen_image"], *rejected]):
        assert np.array_equal(np.asarray(image), np.asarray(picture(number)))


def schema_of(column):
    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.schema({"text": pa.string(), column: pa.list_(file) if column == "rejected_image" else file})


@pytest.mark.parametrize("column", ["chosen_image", "rejected_image"])
@pytest.mark.parametrize("stored", ["paths", "files"])
def test_images_of_pairs_outside_the_folder_are_refused(tmp_path, column, stored):
    (tmp_path / "data").mkdir()
    save(tmp_path)
    outside = str(tmp_path / ROWS[0][0])
    image = outside if stored == "paths" else {"bytes": None, "path": outside}
    row = {"text": "a dog", column: [image] if column == "rejected_image" else image}
    pq.write_table(
        pa.Table.from_pylist([row], None if stored == "paths" else schema_of(column)),
        tmp_path / "data" / "pairs.parquet",
    )
    with pytest.raises(ValueError, match="outside the dataset folder"):
        load_split(str(tmp_path / "data"), "train")
