import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.report.before_after import Example
from clip_po.evaluation.report.page import Page, report_page, write_page
from clip_po.evaluation.report.plots import trade_off_plot
from clip_po.evaluation.report.report_file import read_report, write_report
from clip_po.evaluation.report.summary import MEANINGS, markdown_summary
from clip_po.evaluation.robustness import COLUMNS
from clip_po.evaluation.tables import format_estimate

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "link", "br", "input"}


def around(value, width=0.02):
    return Estimate(value, value - width, value + width)


def metrics(typographic, **more):
    return {
        "clean_accuracy": around(0.7123),
        "typographic_accuracy": around(typographic),
        "occluded_accuracy": around(0.6789),
        "fooled": around(0.0456),
        "reading_effect": around(-0.0111),
        **more,
    }


BASE = metrics(0.3141)
ALIGNED = metrics(0.6543, recovery=around(0.7766, 0.04), clean_cost=around(0.25, 0.8))


@pytest.fixture
def make_report(tmp_path):
    def make(models, command="evaluate", data=None, seconds=89.6, **settings):
        path = write_report(
            tmp_path / "report.json", command=command, models=models, settings=settings, data=data, seconds=seconds
        )
        return read_report(path)

    return make


class Reader(HTMLParser):
    """Elements, texts and attributes of a page. Unbalanced elements fail."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(text for text in self.texts if text)


def read(page, tmp_path):
    return Reader(write_page(tmp_path / "new" / "page.html", page).read_text(encoding="utf-8"))


def picture(index):
    return Image.new("RGB", (640, 320) if index else (32, 32), (10, 20, 200))


EXAMPLES = [
    Example(0, "fixed", truth="cat", word="Dog", before="dog", after="cat"),
    Example(1, "newly broken", truth=EVIL, word=EVIL, before=EVIL, after="car"),
]


def test_a_page_contains_every_number_of_its_report(make_report, tmp_path):
    report = make_report({"base": BASE, "aligned": ALIGNED}, data={"name": "photos", "split": "test", "rows": 1234})
    page = read(report_page(report), tmp_path)
    for found in (BASE, ALIGNED):
        for name, estimate in found.items():
            assert COLUMNS[name] in page.text
            assert format_estimate(estimate, 2 if name == "clean_cost" else 3) in page.text
    for text in ("photos (test)", "1234", "1 min 30 s", report["versions"]["torch"], report["hardware"]["platform"]):
        assert text in page.text
    assert page.tags.count("h1") == 1
    assert ("html", "lang", "en") in page.attributes
    assert {value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")} == {"col", "row"}


@pytest.mark.parametrize(
    ("cost", "told"),
    [
        (0.25, "Recovery .78 [.74, .82] at .2 [-.6, 1.1] points of clean accuracy. With words on the images"),
        (-0.4, "with clean accuracy .4 [-.4, 1.2] points higher"),
    ],
)
def test_the_summary_describes_the_result_in_words(make_report, cost, told):
    report = make_report({"base": BASE, "aligned": {**ALIGNED, "clean_cost": around(cost, 0.8)}})
    summary = report_page(report).summary.replace("\N{NO-BREAK SPACE}", " ")
    assert told in summary
    assert "accuracy goes from .31 [.29, .33] to .65 [.63, .67]" in summary


def test_an_undefined_recovery_is_named_as_undefined(make_report):
    report = make_report({"base": BASE, "aligned": {**ALIGNED, "recovery": Estimate(math.nan)}})
    assert "undefined (the words cost the base nothing)" in report_page(report).summary


def test_one_model_alone_has_a_page(make_report, tmp_path):
    page = report_page(make_report({"aligned": BASE}, model_name_or_path="/home/me/my-clip", seconds=None))
    assert page.title == "Typographic robustness of my-clip"
    assert "39.8 points" in page.summary
    assert "recovery" not in read(page, tmp_path).text


def test_the_chosen_model_is_highlighted(make_report, tmp_path):
    models = {"before": BASE, **{f"M{i}": {**ALIGNED, "recovery": around(0.5 + i / 10)} for i in range(4)}}
    page = report_page(make_report(models, command="demo", chosen="M1"))
    assert page.summary.startswith("M1, the one chosen of 4: recovery")
    assert [row.name for row in page.tables[0].rows if row.marked] == ["M1"]
    assert read(page, tmp_path).text.count("M3") == 1
    best = report_page(make_report(models, command="compare")).summary
    assert best.startswith("M3, picked on these very images as the best of 4")


def test_examples_are_embedded_and_marked_right_or_wrong(make_report, tmp_path):
    report = make_report({"base": BASE, "aligned": ALIGNED})
    page = read(report_page(report, examples=EXAMPLES, picture=picture, changes="Of 9 images: 1 fixed"), tmp_path)
    assert "Of 9 images: 1 fixed" in page.text
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    decoded = [Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) for image in images]
    assert [(image.format, max(image.size)) for image in decoded] == [("PNG", 32), ("JPEG", 384)]
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert alts[0] == "cat, with the word Dog written on it"
    verdicts = [value for tag, name, value in page.attributes if tag == "dd" and name == "class" and value != "note"]
    assert verdicts == ["word", "right", "right", "other"]
    assert [heading in page.text for heading in ("fixed", "newly broken", "still wrong")] == [True, True, False]


def test_the_page_loads_nothing_and_runs_nothing(make_report, tmp_path):
    models = {EVIL: BASE, f"{EVIL} after": ALIGNED, "http://x": ALIGNED, "d": ALIGNED}
    data = {"name": "http://example.org/data", "class_names": [EVIL, "cat"]}
    report = make_report(models, data=data, **{"note": EVIL, "attack_words": [EVIL], EVIL: 1})
    points = {name: (found["clean_accuracy"], found["typographic_accuracy"]) for name, found in models.items()}
    figures = {EVIL: trade_off_plot(points, base=EVIL), "again": trade_off_plot(points)}
    path = tmp_path / "page.html"
    text = write_page(
        path, report_page(report, examples=EXAMPLES, picture=picture, changes=EVIL, figures=figures)
    ).read_text(encoding="utf-8")
    page = Reader(text)
    assert EVIL in page.text
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
        assert not re.search(r"url\((?!#)", value), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"https?:|url\(|@import", style)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags.count("svg") == 2
    assert write_page(path, report_page(report, examples=EXAMPLES, picture=picture, changes=EVIL, figures=figures))
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir() if "page" in file.name] == ["page.html"]


def test_settings_data_and_seeds_can_be_opened(make_report, tmp_path):
    report = make_report({"m": BASE}, seed=7, attack={"seed": 11, "words": ["a", "b"]}, lr=None, push_to_hub=True)
    page = report_page(report)
    assert page.details["Seeds"] == [("seed", "7"), ("attack.seed", "11")]
    settings = dict(page.details["Settings"])
    assert settings == {
        "seed": "7",
        "attack.seed": "11",
        "attack.words": "a, b",
        "lr": "not set",
        "push_to_hub": "yes",
    }
    assert "data" not in read(page, tmp_path).tags
    assert "Data" not in page.details
    assert read(page, tmp_path).tags.count("details") == len(page.details)


def test_wrong_arguments_are_refused(make_report):
    with pytest.raises(ValueError, match=r"picture is missing.* images of the 2 examples"):
        report_page(make_report({"m": BASE}), examples=EXAMPLES)
    with pytest.raises(ValueError, match="has no models"):
        report_page(make_report({}))
    with pytest.raises(ValueError, match=r"'m' has no .*'fooled'"):
        report_page(make_report({"m": {"clean_accuracy": around(0.5)}}))


def test_an_empty_page_is_valid(tmp_path):
    assert read(Page("a title", "about", "a summary"), tmp_path).text.endswith("about a title a summary")


def test_a_model_card_has_the_table_and_the_main_settings(make_report):
    report = make_report(
        {"base": BASE, "aligned": ALIGNED},
        data={"name": "/home/me/photos", "split": "test\n\n## Bad", "rows": 2000},
        base_model_name_or_path="/home/me/clip",
        prompt_template="a <b>|{}",
        attack={"fonts": ["/usr/lib/DejaVuSerif.ttf", "/usr/lib/DejaVuSans.ttf"], "words": []},
        batch_size=128,
        max_samples=None,
        seed=0,
    )
    lines = markdown_summary(report).splitlines()
    assert lines[0].startswith("| model")
    assert format_estimate(ALIGNED["recovery"]) in lines[3]
    assert (
        "Measured by `clip-po evaluate` on photos (test ## Bad), 2,000 images; brackets hold 95% intervals." in lines
    )
    assert lines[-4:] == [
        "| base_model_name_or_path | clip |",
        "| prompt_template | a &lt;b>\\|{} |",
        "| attack.fonts | DejaVuSerif.ttf, DejaVuSans.ttf |",
        "| seed | 0 |",
    ]
    assert not any(line.startswith("#") for line in lines)


def test_every_column_is_explained():
    assert set(MEANINGS) == set(COLUMNS)
