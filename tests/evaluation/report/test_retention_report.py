"""The section on other tasks, as a table, in a model card and on a page."""

import math
import re

import pytest

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.per_class import ClassChange
from clip_po.evaluation.report.page import report_page, write_page
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.report.retention_report import retention_section, retention_table
from clip_po.evaluation.report.summary import markdown_summary

BASE = {name: Estimate(0.5) for name in ("clean_accuracy", "typographic_accuracy", "fooled")}
ALIGNED = {**BASE, "recovery": Estimate(0.8), "clean_cost": Estimate(0.0)}
SETS = {"things": {"rows": 500, "source": "/home/me/things"}, "views": {"rows": 80, "source": "views"}}
MODELS = {
    "base": {"accuracy": Estimate(0.5, 0.4, 0.6), "things: accuracy": Estimate(0.5, 0.4, 0.6)},
    "aligned": {
        "accuracy": Estimate(0.4, 0.3, 0.5),
        "retention_cost": Estimate(10.0, 8.0, 12.0),
        "kl": Estimate(0.3, 0.2, 0.4),
        "things: accuracy": Estimate(0.4, 0.3, 0.5),
        "things: retention_cost": Estimate(10.0, 8.0, 12.0),
        "things: kl": Estimate(0.2, 0.1, 0.3),
        "views: kl": Estimate(0.4, 0.3, math.nan),
    },
}


def change(name, cost):
    return ClassChange(name, 20, 0.5, 0.5 - cost / 100, 3, 1, Estimate(cost, cost - 5, cost + 5))


LOST = [change(f"lost {number}", 60.0 - number) for number in range(12)]
WON = [change(f"won {number}", number - 40.0) for number in range(12, 0, -1)]
CHANGES = {"things": [*LOST, change("same", 0.0), *WON]}


@pytest.fixture
def report(tmp_path):
    section = retention_section(MODELS, SETS, CHANGES, 183)
    path = tmp_path / "report.json"
    models = {"base": BASE, "aligned": ALIGNED}
    return read_report(write_report(path, command="evaluate", models=models, settings={}, retention=section))


def test_a_row_for_each_set_and_model_and_the_mean():
    lines = retention_table(MODELS, SETS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["other tasks", "images", "model", "accuracy", "retention cost (points)", "drift (nats)"]
    assert [row[:3] for row in cells[2:]] == [
        ["things", "500", "base"],
        ["things", "500", "aligned"],
        ["views", "80", "aligned"],
        ["mean over the sets", "580", "base"],
        ["mean over the sets", "580", "aligned"],
    ]
    assert cells[3][3:] == [".400 [.300, .500]", "10.000 [8.000, 12.000]", ".200 [.100, .300]"]
    assert cells[4][3:] == ["n/a", "n/a", ".400"]


def test_at_most_ten_classes_that_lost_and_ten_that_won(report):
    shown = report["retention"]["classes"]["things"]
    assert [row["name"] for row in shown["lost"]] == [f"lost {number}" for number in range(10)]
    assert [row["name"] for row in shown["won"]] == [f"won {number}" for number in range(1, 11)]


def test_the_card_has_the_table_and_the_classes(report):
    card = markdown_summary(report)
    assert retention_table(MODELS, SETS) in card
    assert "over 183 texts" in card
    rows = [line for line in card.splitlines() if line.startswith(("| lost", "| won", "| same"))]
    assert len(rows) == 20
    first = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert first == ["lost 0", "20", "3", "1", ".500", "-.100", "60.000 [55.000, 65.000]"]
    assert rows[-1].startswith("| won 1 ")
    assert not any(line.startswith("#") for line in card.splitlines())
    assert "/home/me" not in card


def test_the_page_has_the_tables_and_says_what_the_columns_mean(report, tmp_path):
    page = report_page(report)
    assert [table.caption for table in page.tables[1:]] == [
        "Other tasks, 95% intervals",
        "Classes of things that lost or won most",
    ]
    text = re.sub("<[^>]*>", "", write_page(tmp_path / "page.html", page).read_text(encoding="utf-8"))
    for part in (
        "10.00 [8.00, 12.00]",
        "views, aligned",
        "80 images",
        "3 lost and 1 won of 20 images",
        "lost 0",
        "won 1",
        "KL(base || model)",
        "183",
    ):
        assert part in text
    assert "things.rows" in dict(page.details["What the numbers about other tasks mean"])


def test_a_report_without_other_tasks_says_nothing_about_them(tmp_path):
    path = write_report(tmp_path / "report.json", command="evaluate", models={"base": BASE}, settings={})
    report = read_report(path)
    assert "retention" not in report
    assert "other tasks" not in markdown_summary(report)
    assert not any("other tasks" in heading for heading in report_page(report).details)
