import json
import math
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_po.evaluation.report.report_file as report_module
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.report_file import read_report, report_estimates, write_report
from clip_po.evaluation.tables import format_estimate, format_number, format_table

MODELS = {"base": {"clean_accuracy": Estimate(0.9, 0.8, 0.95), "recovery": Estimate(math.nan)}}


def write(path, **arguments):
    return write_report(path, **{"command": "evaluate", "models": MODELS, "settings": {}, **arguments})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9341, ".934"),
        (-0.02, "-.020"),
        (1, "1.000"),
        (12.5, "12.500"),
        (-1.25, "-1.250"),
        (0, ".000"),
        (-0.0001, ".000"),
        (math.nan, "n/a"),
        (math.inf, "n/a"),
    ],
)
def test_numbers_are_printed_as_papers_do(value, text):
    assert format_number(value) == text


def test_estimates_carry_their_interval_where_there_is_one():
    assert format_estimate(Estimate(0.934, 0.921, 0.945)) == ".934 [.921, .945]"
    assert format_estimate(Estimate(1.5, -0.25, 3), digits=1) == "1.5 [-.2, 3.0]"
    assert format_estimate(Estimate(0.5)) == ".500"
    assert format_estimate(Estimate(math.nan)) == "n/a"


def test_a_table_is_aligned_markdown():
    table = format_table(
        ["model", "accuracy", "rows"],
        [["base", Estimate(0.934, 0.921, 0.945), 2000], ["a|b", 0.5, None]],
    )
    assert table.splitlines() == [
        "| model |          accuracy | rows |",
        "| ----- | ----------------: | ---: |",
        "| base  | .934 [.921, .945] | 2000 |",
        "| a\\|b  |              .500 |  n/a |",
    ]


def test_a_table_without_rows_is_its_header():
    assert format_table(["a", "b"], []).splitlines() == ["| a   | b   |", "| --- | --- |"]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="Row 1 has 1 cells for the 2 columns"):
        format_table(["a", "b"], [["x", "y"], ["x"]])


def test_a_report_comes_back_as_it_was_written(tmp_path):
    path = write(tmp_path / "new" / "report.json", data={"rows": 3}, settings={"seed": 1}, seconds=2.5)
    report = read_report(path)
    assert set(report) == {
        "schema_version",
        "clip_po_version",
        "command",
        "created",
        "models",
        "data",
        "settings",
        "versions",
        "hardware",
        "seconds",
    }
    assert (report["schema_version"], report["command"], report["seconds"]) == (1, "evaluate", 2.5)
    assert (report["data"], report["settings"]) == ({"rows": 3}, {"seed": 1})
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    estimates = report_estimates(report)
    assert estimates["base"]["clean_accuracy"] == MODELS["base"]["clean_accuracy"]
    assert math.isnan(estimates["base"]["recovery"].low)


def test_undefined_numbers_are_null(tmp_path):
    text = write(tmp_path / "report.json", settings={"lr": math.inf}, seconds=math.nan).read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads(text, parse_constant=refuse)
    assert report["models"]["base"]["recovery"] == {"value": None, "low": None, "high": None}
    assert report["settings"]["lr"] is None
    assert report["seconds"] is None


@dataclass
class Inner:
    hub_token: str = "secret"
    size: int = 3


class Colour(Enum):
    RED = "red"


def test_tokens_are_redacted_at_any_depth(tmp_path):
    settings = {
        "HUB_TOKEN": "secret",
        "deep": [{"push": {"token": "secret", "kept": "yes"}}],
        "inner": Inner(),
        "argv": ["--login", "hf_" + "a1B2" * 8],
    }
    text = write(tmp_path / "report.json", settings=settings, data={"access_token": "secret"}).read_text()
    assert "secret" not in text
    assert "hf_" not in text
    read = json.loads(text)["settings"]
    assert read["deep"] == [{"push": {"token": "<redacted>", "kept": "yes"}}]
    assert read["inner"]["size"] == 3


def test_settings_may_hold_anything(tmp_path):
    settings = {
        "path": Path("a/b"),
        "dtype": torch.float32,
        "array": np.arange(2),
        "number": np.float64(0.5),
        "tensor": torch.ones(1),
        "set": {"b", "a"},
        "tuple": (1, None, True),
        "enum": Colour.RED,
        3: "three",
    }
    assert read_report(write(tmp_path / "report.json", settings=settings))["settings"] == {
        "path": "a/b",
        "dtype": "torch.float32",
        "array": [0, 1],
        "number": 0.5,
        "tensor": [1.0],
        "set": ["a", "b"],
        "tuple": [1, None, True],
        "enum": "red",
        "3": "three",
    }


def test_a_bare_number_is_no_estimate(tmp_path):
    with pytest.raises(TypeError, match=r"accuracy of base is 0\.5, expected an Estimate"):
        write(tmp_path / "report.json", models={"base": {"accuracy": 0.5}})


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = write(tmp_path / "report.json")
    before = path.read_text()
    monkeypatch.setattr(report_module.os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, command="compare")
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no schema_version"),
        ("{}", "has no schema_version"),
        (
            '{"schema_version": 2, "clip_po_version": "9.0"}',
            r"schema_version 2 \(written by clip_po 9\.0\).*run the command again",
        ),
    ],
)
def test_what_is_no_report_of_this_version_is_refused(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(path)


def test_a_missing_report_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "report.json")
