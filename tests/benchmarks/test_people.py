"""benchmarks/people.py in its smallest form: both tables and both plots, on pictures that show no people."""

import importlib
import sys
from pathlib import Path

import datasets
import pytest
from samples import picture, write_parquet

ROOT = Path(__file__).parents[2]
GROUPS = ["man", "woman", "child", "elder"]


def faces(rows):
    """Pictures with the columns of the faces: adults of both genders and two races, and some of the other groups."""
    gender = [row % 2 for row in range(rows)]
    features = {
        "image": datasets.Image(),
        "gender": datasets.ClassLabel(names=GROUPS[:2]),
        "group": datasets.ClassLabel(names=GROUPS),
        "race": datasets.ClassLabel(names=["one", "other"]),
        "age": datasets.Value("int32"),
    }
    columns = {
        "image": [picture(row) for row in range(rows)],
        "gender": gender,
        "group": [2 + row // 6 % 2 if row % 6 == 5 else gender[row] for row in range(rows)],
        "race": [row // 2 % 2 for row in range(rows)],
        "age": [30] * rows,
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def people(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("people")


def test_every_way_and_baseline_is_measured(people, clip_folder, tmp_path, monkeypatch, capsys):
    for name in ("faces", "things"):
        (tmp_path / name).mkdir()
    for split in ("train", "test"):
        faces(36).to_parquet(tmp_path / "faces" / f"{split}.parquet")
    write_parquet(tmp_path / "things", train=4, test=4)
    flags = {
        "model": clip_folder,
        **{name: tmp_path / name for name in ("faces", "things", "plots")},
        **{"left_out": 0.5, "k": 5, "max_steps": 1, "resamples": 2},
    }
    monkeypatch.setattr(sys, "argv", ["people.py", *(str(x) for n, v in flags.items() for x in (f"--{n}", v))])
    people.main()
    tables = [table.splitlines()[2:] for table in capsys.readouterr().out.strip().split("\n\n")]
    by_gender, others, by_scale = ([line.split("|")[1].strip() for line in table] for table in tables)
    assert by_gender == others
    assert [name.split(":")[0] for name in by_gender] == [
        "before",
        *(f"{way}, {count} occupations" for count in (6, 3) for way in ("full", "LoRA", "W")),
        *("orthogonal projection", "biased prompts", "subspace projection", "feature clipping", "random order"),
    ]
    assert {float(t) for t in by_scale} >= set(people.SCALES)
    assert {plot.name for plot in (tmp_path / "plots").iterdir()} == {"people_bias.png", "people_steer.png"}
