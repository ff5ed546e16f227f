"""benchmarks/architecture_table.py: every architecture trains on every row format, and reloads."""

import importlib
import sys
from pathlib import Path

import pytest
from dual_encoders import SUPPORTED

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

table = importlib.import_module("architecture_table")


@pytest.mark.parametrize("form", table.FORMATS)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_model_trains_on_the_rows_and_reloads_as_it_was_trained(kind, form, tmp_path):
    cell = table.run_cell(kind, form, tmp_path)
    assert cell.difference < 1e-5
    assert cell.moved > 1e-4


def test_the_table_has_a_cell_for_each(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["architecture_table.py", "--architectures", "clip", "--formats", "preferences"])
    table.main()
    head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.split("|")[1:3] == [" architecture ", " preferences     "]
    assert row.split("|")[1].strip() == "clip"
    assert float(row.split("|")[2].split()[0]) < 1e-5
