"""The demo runs the product's own path on a few digits."""

import json

import pytest
from transformers import CLIPModel

from clip_po.cli import demo
from clip_po.cli.main import main


@pytest.mark.slow
def test_the_demo_aligns_measures_and_shows(tmp_path, capsys, monkeypatch):
    """One epoch of four: `make demo` runs all of them."""
    monkeypatch.setattr(demo, "TRAINING", {**demo.TRAINING, "num_train_epochs": 1})
    out = tmp_path / "demo"
    arguments = ["--methods", "DPO", "CE", "--train_renderings", "1", "--renderings", "1"]
    assert main(["demo", "--output_dir", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| DPO" in printed
    report = json.loads((out / "report.json").read_text())
    before, after = report["models"]["before"], report["models"]["DPO"]
    assert before["typographic_accuracy"]["value"] <= before["clean_accuracy"]["value"] / 2
    assert after["typographic_accuracy"]["value"] > before["typographic_accuracy"]["value"] + 0.2
    assert (out / "before_after.png").is_file()
    CLIPModel.from_pretrained(out / "checkpoint")
