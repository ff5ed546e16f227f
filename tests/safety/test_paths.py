"""No archive, link or path of a data set leaves its folder, and none of its scripts runs."""

import contextlib
import io
import json
import os
import shutil
import tarfile
import zipfile

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from samples import CLASSES, make_labelled, picture

from clip_po.data.loading import load_split
from clip_po.data.path_safety import check_links
from clip_po.evaluation.suites.layouts import load_annotation, load_file_names
from clip_po.evaluation.suites.vl_bias import load_vl_bias


@pytest.fixture
def secret(tmp_path):
    """A picture outside of any data set."""
    return save(tmp_path / "private" / "secret.png")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of images with one class each."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(cache / "extracted"))
    for name in CLASSES:
        save(tmp_path / "data" / "train" / name / "1.png")
    return tmp_path / "data"


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(0).save(path)
    return path


def png():
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    return buffer.getvalue()


def test_a_folder_without_tricks_loads(data):
    assert len(load_split(str(data), "train")) == len(CLASSES)
    os.symlink(data / "train" / "cat" / "1.png", data / "train" / "dog" / "2.png")
    assert len(load_split(str(data), "train")) == len(CLASSES) + 1


def test_the_script_of_a_data_set_does_not_run(data, marker):
    (data / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in (data, data / "data.py"):
        with pytest.raises(ValueError, match="scripts are no longer supported"):
            load_split(str(name), "train")


@pytest.mark.parametrize("below", ["train/cat/2.png", "train/fish"])
def test_a_link_out_of_a_folder_of_images_is_refused(data, secret, below):
    os.symlink(secret if below.endswith("png") else secret.parent, data / below)
    with pytest.raises(ValueError, match=rf"{below} is a link to .*private.*outside"):
        load_split(str(data), "train")


@pytest.mark.parametrize(
    "load", [load_file_names, load_annotation, lambda folder: load_vl_bias(folder, "occupations")]
)
def test_a_link_out_of_photographs_is_refused(load, tmp_path, secret):
    folder = tmp_path / "photographs"
    (folder / "occu" / "nurse").mkdir(parents=True)
    os.symlink(secret, folder / "occu" / "nurse" / "label=dog_text=cat.png")
    (folder / "annotations.json").write_text("{}")
    with pytest.raises(ValueError, match="is a link to"):
        load(folder)


def test_links_of_the_hubs_cache_and_to_the_folder_itself_are_taken(tmp_path):
    snapshot = tmp_path / "datasets--me--mine" / "snapshots" / "0123"
    blob = save(tmp_path / "datasets--me--mine" / "blobs" / "beef.png")
    snapshot.mkdir(parents=True)
    os.symlink(blob, snapshot / "label=dog_text=cat.png")
    os.symlink(snapshot, tmp_path / "link")
    check_links(snapshot)
    assert len(load_file_names(snapshot)) == 1
    os.symlink(tmp_path, snapshot / "up")
    with pytest.raises(ValueError, match="outside"):
        check_links(snapshot)


@pytest.mark.parametrize("key", ["data_files", "data_dir"])
@pytest.mark.parametrize("where", ["../private", "absolute"])
def test_a_readme_that_names_files_elsewhere_is_refused(key, where, data, secret):
    named = where if where != "absolute" else str(secret.parent)
    settings = {"config_name": "default", key: f"{named}/*.png" if key == "data_files" else named}
    (data / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [settings]})}---\n")
    with pytest.raises(ValueError, match=r"names the file .*secret\.png.*outside"):
        load_split(str(data), "train")


@pytest.mark.parametrize("named", ["absolute", "../private/secret.png", "https://example.com/x.png", "/etc/passwd"])
@pytest.mark.parametrize("storage", ["parquet", "disk"])
def test_a_table_that_names_images_elsewhere_is_refused(named, storage, secret, tmp_path, data):
    path = str(secret) if named == "absolute" else named
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    images = [{"bytes": png(), "path": "1.png"}, {"bytes": None, "path": path}]
    rows = [{"image": image, "label": label} for label, image in enumerate(images)]
    table = datasets.Dataset.from_list(rows, features=features)
    folder = tmp_path / "table"
    # Their own writers would put the picture in.
    if storage == "parquet":
        folder.mkdir()
        pq.write_table(table.data.table, folder / "train-00000-of-00001.parquet")
    else:
        table.take(1).save_to_disk(folder)
        written = folder / json.loads((folder / "state.json").read_text())["_data_files"][0]["filename"]
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(written)) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    with pytest.raises(ValueError, match=r"names the file .*outside"):
        load_split(str(folder), "train")


def test_a_saved_data_set_whose_rows_lie_elsewhere_is_refused(tmp_path):
    make_labelled(4).save_to_disk(tmp_path / "private")
    shutil.copytree(tmp_path / "private", tmp_path / "data")
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../private/" + state["_data_files"][0]["filename"]
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"names the file .*private.*outside"):
        load_split(str(tmp_path / "data"), "train")


def outside(folder, cache):
    """What lies in a folder, but for the cache of unpacked archives."""
    return {path for path in folder.rglob("*") if not path.is_relative_to(cache)}


def test_a_zip_of_images_is_unpacked_nowhere_else(tmp_path, data, secret):
    folder = tmp_path / "zipped"
    folder.mkdir()
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("metadata.csv", "file_name,word\n1.png,cat\n")
        for name in ("1.png", "../../../../../evil.png", str(tmp_path / "evil.png")):
            archive.writestr(name, png())
        archive.writestr(link, str(secret))
    before = outside(tmp_path, tmp_path / "cache")
    with contextlib.suppress(ValueError):
        load_split(str(folder), "train")
    assert outside(tmp_path, tmp_path / "cache") == before
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_a_tar_of_images_is_unpacked_nowhere_else(tmp_path, data, secret):
    folder = tmp_path / "tarred"
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name in ("a.png", "../evil.png", str(tmp_path / "evil.png")):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    before = outside(tmp_path, tmp_path / "cache")
    rows = load_split(str(folder), "train")
    assert outside(tmp_path, tmp_path / "cache") == before
    assert [column for column in rows.column_names if not column.startswith("__")] == ["png"]
