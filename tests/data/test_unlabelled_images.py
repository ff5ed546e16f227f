"""Images without labels from folders, tables and streams."""

import datasets
import pytest
from samples import make_labelled, picture, write_parquet

from clip_po.data import unlabelled_images
from clip_po.data.embedding_cache import image_digest
from clip_po.data.unlabelled_images import load_images


def shown(images):
    return [image.convert("RGB").tobytes() for image in images["image"]]


def test_a_folder_of_images_in_any_folders(tmp_path):
    for number, name in enumerate(("a.png", "deep/er/b.png", "other/c.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    images = load_images(str(tmp_path), "train", 10)
    assert images.column_names == ["image"]
    assert shown(images) == [picture(number).tobytes() for number in range(3)]


def test_a_table_keeps_its_images_alone(tmp_path):
    images = load_images(str(write_parquet(tmp_path, train=4, test=2)), "test", 10)
    assert images.column_names == ["image"]
    assert shown(images) == shown(make_labelled(2))


def test_another_name_of_the_column(tmp_path):
    make_labelled(3).rename_column("image", "picture").to_parquet(tmp_path / "train.parquet")
    assert load_images(str(tmp_path), "train", 10).column_names == ["image"]


def test_columns_that_may_all_be_meant_are_refused(tmp_path):
    rows = make_labelled(3)
    columns = {"left": list(rows["image"]), "right": list(rows["image"])}
    features = datasets.Features({name: datasets.Image() for name in columns})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"2 columns of images \['left', 'right'\]"):
        load_images(str(tmp_path), "train", 10)


def test_the_seed_draws_the_images_that_are_kept(tmp_path):
    folder = str(write_parquet(tmp_path, train=12))
    first, again, other = (shown(load_images(folder, "train", 5, seed)) for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again != other


def test_of_a_dataset_on_the_hub_only_the_first_images_are_read(monkeypatch):
    read = []

    def rows():
        for number, row in enumerate(make_labelled(8)):
            read.append(number)
            yield row

    def streamed(name, split, streaming):
        assert (name, split, streaming) == ("someone/things", "train", True)
        return datasets.IterableDataset.from_generator(rows, features=make_labelled(1).features)

    monkeypatch.setattr(unlabelled_images, "load_dataset", streamed)
    images = load_images("someone/things", "train", 3)
    assert shown(images) == shown(make_labelled(3))
    assert max(read) < 7


def test_images_that_the_hub_names_by_their_address_are_kept(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        picture(number).save(file)

    def rows():
        for file in files:
            yield {"image": {"path": str(file), "bytes": None}}

    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(unlabelled_images, "load_dataset", lambda name, split, streaming: stream)
    images = load_images("someone/folder", "train", 5)
    for file in files:
        file.unlink()
    assert shown(images) == [picture(number).tobytes() for number in range(2)]
    assert image_digest(images, "image")


def test_nothing_there_is_said():
    with pytest.raises(ValueError, match="can't be loaded"):
        load_images("no/such-dataset", "train", 3)
