import math
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.calibration import ReliabilityBin
from clip_po.evaluation.report.figures import figure_svg, save_figure
from clip_po.evaluation.report.plots import cost_plot, format_seconds, retention_plot, sweep_plot, trade_off_plot
from clip_po.evaluation.report.reliability_plot import reliability_plot


def around(value, width=0.01):
    return Estimate(value, value - width, value + width)


POINTS = {
    "base": (around(0.70), around(0.60)),
    "DPO": (around(0.69), around(0.61)),
    "DPO LoRA": (around(0.695), around(0.605)),
    "IPO": (around(0.691), around(0.612)),
}


def texts(figure):
    root = ElementTree.fromstring(figure_svg(figure))
    return [element.text for element in root.iter("text")]


def label_boxes(figure):
    """Return the boxes of the names, without the lines to their points."""
    figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text().startswith("method")]


def test_points_of_a_trade_off_are_named_and_the_cost_marked():
    shown = texts(trade_off_plot(POINTS, base="base", allowed_cost=2))
    assert {*POINTS, "clean accuracy", "typographic accuracy", "base \N{MINUS SIGN} 2 points"} <= set(shown)
    guides = [line for line in trade_off_plot(POINTS, base="base").axes[0].lines if set(line.get_xdata()) == {0.69}]
    assert len(guides) >= 1


def test_a_base_far_below_is_drawn_on_the_edge_with_its_number():
    figure = trade_off_plot({**POINTS, "base": (around(0.70), around(0.123))}, base="base")
    assert "base: .123, below" in texts(figure)
    assert figure.axes[0].get_ylim()[0] > 0.55
    # With one other point nothing can overlap, so both points are drawn in place.
    figure = trade_off_plot({"base": (around(0.70), around(0.123)), "DPO": POINTS["DPO"]}, base="base")
    assert figure.axes[0].get_ylim()[0] < 0.123


def test_groups_share_colours_by_method_and_markers_by_group():
    groups = {"DPO": ("DPO", "full"), "DPO LoRA": ("DPO", "LoRA"), "IPO": ("IPO", "full")}
    figure = trade_off_plot(POINTS, base="base", groups=groups)
    lines = {(float(line.get_xdata()[0]), line.get_marker()): line for line in figure.axes[0].lines}
    full, lora, ipo = lines[0.69, "o"], lines[0.695, "s"], lines[0.691, "o"]
    assert full.get_color() == lora.get_color() != ipo.get_color()
    assert any(set(line.get_xdata()) == {0.69, 0.695} and len(line.get_xdata()) == 2 for line in figure.axes[0].lines)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["full", "LoRA"]


def test_twenty_crowded_names_do_not_overlap():
    rng = np.random.default_rng(0)
    points = {f"method {i}": (around(x), around(y)) for i, (x, y) in enumerate(rng.normal(0.7, 0.004, (20, 2)))}
    figure = trade_off_plot(points)
    boxes, frame = label_boxes(figure), figure.axes[0].get_window_extent()
    assert len(boxes) == 20
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlapping == []
    assert all(
        frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes
    )


def test_costs_are_shown_in_units_of_time():
    shown = texts(
        cost_plot({"DPO": 20.0, "IPO": 1500.0}, {"DPO": around(0.7), "IPO": around(0.8), "other": around(1)})
    )
    assert {"DPO", "IPO", "recovery", "1 min", "10 min"} <= set(shown)
    assert "other" not in shown


def test_recovery_against_what_other_tasks_lose():
    costs = {"DPO": around(5.4, 2.5), "embedding": around(-0.5, 1.6)}
    recovery = {"DPO": around(0.86), "embedding": around(0.84), "unmeasured": around(0.9)}
    figure = retention_plot(costs, recovery)
    assert {"DPO", "embedding", "retention cost (points)", "recovery", "1 point"} <= set(texts(figure))
    assert "unmeasured" not in texts(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < -2.1
    assert high > 7.9
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[5.4, 0.86]] in drawn
    with pytest.raises(ValueError, match=r"'IPO'.*no recovery"):
        retention_plot({"IPO": around(1.0)}, recovery)
    with pytest.raises(ValueError, match="retention cost of DPO"):
        retention_plot({"DPO": Estimate(math.nan)}, recovery)


def test_a_sweep_names_its_curves_and_the_chosen_position():
    clean, attacked = [around(0.7), around(0.69), around(0.6)], [around(0.3), around(0.5), Estimate(math.nan)]
    figure = sweep_plot([0, 0.5, 1], {"clean": clean, "typographic": attacked}, xlabel="alpha", chosen=0.5)
    shown = texts(figure)
    assert {"clean", "typographic", "alpha", "accuracy", "chosen 0.5: clean .690, typographic .500"} <= set(shown)
    unordered = sweep_plot(
        [1, 0.5, 0], {"clean": clean[::-1], "typographic": attacked[::-1]}, xlabel="alpha", chosen=0.5
    )
    assert figure_svg(unordered) == figure_svg(figure)


def test_names_of_equal_curves_do_not_overlap():
    curve = [around(0.5), around(0.6)]
    figure = sweep_plot([0, 1], {f"method {i}": curve for i in range(5)}, xlabel="t")
    boxes = label_boxes(figure)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_numbers_give_the_same_bytes_under_any_matplotlibrc(tmp_path, ending):
    first = save_figure(trade_off_plot(POINTS, base="base"), tmp_path / "new" / f"a.{ending}").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        second = save_figure(trade_off_plot(POINTS, base="base"), tmp_path / f"b.{ending}").read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second
    if ending == "png":
        with Image.open(tmp_path / "b.png") as image:
            assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def test_two_svgs_fit_into_one_page():
    one, other = figure_svg(trade_off_plot(POINTS)), figure_svg(sweep_plot([0], {"a": [around(0.5)]}, xlabel="t"))
    assert one == figure_svg(trade_off_plot(POINTS))
    assert one.startswith("<svg")
    for word in ("http", "<style", "<!DOCTYPE", "<metadata", "xlink"):
        assert word not in one
    ids = [[e.get("id") for e in ElementTree.fromstring(svg).iter() if e.get("id")] for svg in (one, other)]
    assert ids[0]
    assert len(set(ids[0] + ids[1])) == len(ids[0] + ids[1])
    for name in ids[0]:
        assert f"#{name}" in one
    assert "var(--plot-ink, #181c24)" in one


def test_names_are_plain_text():
    evil = "<script>alert(1)</script> $x^$ \\frac"
    figure = trade_off_plot({evil: POINTS["DPO"], "a": POINTS["IPO"]}, base="a")
    assert evil in texts(figure)
    assert "<script" not in figure_svg(figure)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no points to draw"):
        trade_off_plot({})
    with pytest.raises(ValueError, match="typographic accuracy of DPO is nan"):
        trade_off_plot({"DPO": (around(0.5), Estimate(math.nan))})
    with pytest.raises(ValueError, match="'x' is not one of the points"):
        trade_off_plot(POINTS, base="x")
    with pytest.raises(ValueError, match=r"seconds of 'DPO' are 0\.0, expected more than 0"):
        cost_plot({"DPO": 0.0}, {"DPO": around(0.5)})
    with pytest.raises(ValueError, match="'DPO' has seconds but no recovery"):
        cost_plot({"DPO": 1.0}, {"IPO": around(0.5)})
    with pytest.raises(ValueError, match="'a' has 1 estimates for 2 positions"):
        sweep_plot([0, 1], {"a": [around(0.5)]}, xlabel="t")
    with pytest.raises(ValueError, match=r"chosen=0\.3 is not one of"):
        sweep_plot([0, 1], {"a": [around(0.5)] * 2}, xlabel="t", chosen=0.3)
    with pytest.raises(ValueError, match="Nothing to draw"):
        sweep_plot([], {}, xlabel="t")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        save_figure(trade_off_plot(POINTS), tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, ".25 s"),
        (4.06, "4.1 s"),
        (30, "30 s"),
        (59.7, "1 min"),
        (89.6, "1 min 30 s"),
        (3600, "1 h"),
        (3900, "1 h 5 min"),
    ],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert format_seconds(seconds) == text


def test_a_reliability_diagram_has_each_bin_with_an_area_of_its_rows():
    bins = [ReliabilityBin(0.5, 0.55, 0.52, 0.4, 10), ReliabilityBin(0.95, 1.0, 0.99, 0.7, 40)]
    figure = reliability_plot({"base": bins, "aligned": bins[:1]})
    base, aligned = figure.axes[0].collections
    assert base.get_offsets().tolist() == [[0.52, 0.4], [0.99, 0.7]]
    assert base.get_sizes()[0] < base.get_sizes()[1]
    assert aligned.get_offsets().tolist() == [[0.52, 0.4]]
    assert {"base", "aligned", "probability"} <= set(texts(figure))
