"""Splits and classes of folders: a split is a folder directly in the dataset folder, and nothing else is."""

import pytest
from samples import picture

from clip_po.data.loading import load_split


def save(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


def found(folder, split="train"):
    """The name of each image's file with its class."""
    rows = load_split(str(folder), split)
    names = rows.features["label"].int2str(rows["label"])
    paths = [row["path"] for row in rows.with_format("arrow")[:]["image"].to_pylist()]
    return sorted((path.split("/")[-1], name) for path, name in zip(paths, names, strict=True))


CLASSES = ("cat", "dog", "train", "test_tube", "dev", "my test", "Validation")


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_with_the_names_of_splits_stay_in_their_split(tmp_path, split):
    save(tmp_path, *(f"{part}/{name}/{part}{i}.png" for part in ("train", "test") for name in CLASSES for i in (0, 1)))
    assert found(tmp_path, split) == sorted((f"{split}{i}.png", name) for name in CLASSES for i in (0, 1))


def test_so_does_a_file_with_the_name_of_a_split(tmp_path):
    names = ("drug test 1.PNG", "train_2.png", "val.3.png", "test.png")
    save(tmp_path, *(f"{name}/{file}" for name in ("drug", "pill") for file in names))
    assert found(tmp_path) == sorted((file, name) for name in ("drug", "pill") for file in names)


def test_a_folder_above_with_the_name_of_a_split_means_nothing(tmp_path):
    save(tmp_path / "test" / "val", "cat/0.png", "dog/1.png")
    assert found(tmp_path / "test" / "val") == [("0.png", "cat"), ("1.png", "dog")]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("like_a_split", ["train", "test", "val", "dev"])
def test_a_class_beside_others_that_may_be_a_split_is_refused(tmp_path, like_a_split, split):
    save(tmp_path, "cat/0.png", "dog/1.png", f"{like_a_split}/2.png")
    with pytest.raises(ValueError, match=f"not clear whether '{like_a_split}' is a split or a class"):
        load_split(str(tmp_path), split)


def test_folders_beside_split_folders_are_left_alone(tmp_path):
    save(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png", "thumbnails/4.png")
    assert found(tmp_path, "test") == [("2.png", "cat"), ("3.png", "dog")]
    assert found(tmp_path, "train") == [("0.png", "cat"), ("1.png", "dog")]


def test_a_split_is_found_under_its_other_names_but_its_own_name_wins(tmp_path):
    save(tmp_path, "training/cat/0.png", "training/dog/1.png", "val/cat/2.png", "val/dog/3.png")
    assert found(tmp_path, "validation") == found(tmp_path, "val") == [("2.png", "cat"), ("3.png", "dog")]
    assert found(tmp_path, "train") == [("0.png", "cat"), ("1.png", "dog")]
    save(tmp_path, "dev/cat/4.png", "dev/dog/5.png")
    assert found(tmp_path, "dev") == [("4.png", "cat"), ("5.png", "dog")]
    with pytest.raises(ValueError, match=r"several folders for the split 'validation'.*'dev'.*'val'"):
        load_split(str(tmp_path), "validation")
    with pytest.raises(ValueError, match="no split 'test'"):
        load_split(str(tmp_path), "test")


def test_a_folder_without_splits_is_the_training_split(tmp_path):
    save(tmp_path, "cat/0.png", "dog/1.png")
    assert found(tmp_path) == [("0.png", "cat"), ("1.png", "dog")]
    with pytest.raises(ValueError, match="all of its images are the split 'train'"):
        load_split(str(tmp_path), "test")


def test_splits_share_their_classes(tmp_path):
    save(tmp_path, "train/bird/0.png", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")
    train, test = (load_split(str(tmp_path), split) for split in ("train", "test"))
    assert test.features["label"] == train.features["label"]
    assert found(tmp_path, "test") == [("3.png", "cat"), ("4.png", "dog")]


def test_classes_are_the_level_of_folders_that_varies(tmp_path):
    save(tmp_path, *(f"train/{name}/images/{i}.png" for name in ("n01", "n02") for i in (0, 1)), "val/images/9.png")
    assert found(tmp_path) == [("0.png", "n01"), ("0.png", "n02"), ("1.png", "n01"), ("1.png", "n02")]
    assert load_split(str(tmp_path), "val").column_names == ["image"]


@pytest.mark.parametrize("other", ["train/dog/big/1.png", "train/1.png"])
def test_levels_that_do_not_say_what_a_class_is_are_refused(tmp_path, other):
    save(tmp_path, "train/cat/small/0.png" if "big" in other else "train/cat/0.png", other)
    with pytest.raises(ValueError, match="not clear which folders"):
        load_split(str(tmp_path), "train")


def test_splits_one_folder_further_down_are_said(tmp_path):
    save(tmp_path, "data/train/cat/0.png", "data/train/dog/1.png", "data/test/cat/2.png")
    with pytest.raises(ValueError, match="are in its folder 'data'"):
        load_split(str(tmp_path), "train")


def test_slices_and_sums_of_splits(tmp_path):
    save(tmp_path, *(f"{part}/{name}/{i}.png" for part in ("train", "test") for name in "ab" for i in range(5)))
    assert len(load_split(str(tmp_path), "train[:3]")) == 3
    assert len(load_split(str(tmp_path), "train[10%:60%]+test")) == 5 + 10


def test_images_alone_have_no_labels_and_hidden_files_are_no_images(tmp_path):
    save(tmp_path, "0.png", "1.JPEG")
    save(tmp_path, ".hidden.png", "__MACOSX/0.png", ".thumbnails/1.png")
    rows = load_split(str(tmp_path), "train")
    assert rows.column_names == ["image"]
    assert len(rows) == 2
