"""benchmarks/retention.py in its smallest form: every kind of row, resumed from what is stored."""

import importlib
import sys
from pathlib import Path

import datasets
import pytest
from samples import CLASSES, picture, write_parquet

ROOT = Path(__file__).parents[2]
METHODS = ["default", "default, photographs", "CE + soft, interpolation .7", "CE + soft, L2 to the start"]


@pytest.fixture
def retention(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("retention")


@pytest.fixture
def arguments(tmp_path, clip_folder):
    for name in ("task", "others", "generic"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name, train=12, test=8)
    groups = ["man", "woman", "child"]
    faces = {
        "image": [picture(n) for n in range(9)],
        "gender": [n % 2 for n in range(9)],
        "group": [n % 3 if n % 3 == 2 else n % 2 for n in range(9)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "gender": datasets.ClassLabel(names=groups[:2]),
            "group": datasets.ClassLabel(names=groups),
        }
    )
    (tmp_path / "people").mkdir()
    datasets.Dataset.from_dict(faces, features=features).to_parquet(tmp_path / "people" / "test.parquet")
    (tmp_path / "words.txt").write_text("\n".join([*CLASSES, "moon", "sugar"]))
    paths = {name: str(tmp_path / name) for name in ("task", "others", "people", "generic")}
    given = {
        "model": str(clip_folder),
        **paths,
        "words": str(tmp_path / "words.txt"),
        "output_dir": str(tmp_path / "o"),
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [*flags, "--train_split", "train", "--part", "test", "--max_steps", "1"]


def test_every_kind_of_row_is_measured_once(retention, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retention.py", *arguments, "--methods", *METHODS])
    retention.main()
    table = capsys.readouterr().out.splitlines()[-len(METHODS) :]
    assert [line.split("|")[1].strip() for line in table] == METHODS
    monkeypatch.setattr(retention, "train", lambda *args: pytest.fail("it ran again"))
    retention.main()
    assert capsys.readouterr().out.splitlines()[-len(METHODS) :] == table
