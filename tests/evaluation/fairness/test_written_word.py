import runpy
from pathlib import Path

import numpy as np
import pytest

from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.fairness import WrittenWordEvaluator
from clip_po.evaluation.fairness.written_word import (
    CLEAN_IMAGES,
    ORACLE,
    RANDOM,
    class_size,
    least_biased,
    written_word_report,
    written_word_scores,
    written_word_table,
)
from clip_po.evaluation.robustness import RobustnessImages

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "bias.py"


@pytest.fixture
def images(dataset, attack, processor):
    return RobustnessImages(dataset, attack, processor, renderings=40)


def sees(images):
    return (images.label == np.arange(3)[:, None]).astype(float)


def reads(images):
    return (images.word == np.arange(3)[:, None]).astype(float)


def report(images, written, clean, **arguments):
    return written_word_report(
        {"clean": clean, "typographic": written}, images, "before", **{"resamples": 20, **arguments}
    )


def test_scores_are_those_of_either_image(model, dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor)
    scores = written_word_scores({"model": model}, images, ["a photo of a {}"], batch_size=4, disable_tqdm=True)
    assert set(scores) == {"clean", "typographic"}
    assert scores["clean"]["model"].shape == (3, 13)
    assert not np.allclose(scores["clean"]["model"], scores["typographic"]["model"])
    again = written_word_scores({"model": model}, images, ["a photo of a {}"], batch_size=13, disable_tqdm=True)
    np.testing.assert_allclose(again["typographic"]["model"], scores["typographic"]["model"], atol=1e-5)


def test_the_evaluator_returns_the_report_of_the_scores(model, other_model, dataset, attack, processor):
    images = RobustnessImages(dataset, attack, processor, renderings=2)
    models, templates = {"before": model, "after": other_model}, ["a photo of a {}"]
    evaluator = WrittenWordEvaluator(images, templates, resamples=5, seed=2)
    scores = written_word_scores(models, images, templates, disable_tqdm=True)
    expected = written_word_report(scores, images, "before", resamples=5, seed=2)
    found = evaluator(models, "before", disable_tqdm=True)
    assert found.keys() == expected.keys() == {"before", "after", CLEAN_IMAGES, ORACLE, RANDOM}
    for name, metrics in expected.items():
        assert str(found[name]) == str(metrics)  # as texts, where nan equals nan
    assert evaluator.primary_metric in found["after"]
    assert not evaluator.greater_is_better
    with pytest.raises(ValueError, match=r"base is missing.*before"):
        evaluator(models, disable_tqdm=True)


def test_a_reader_is_as_skewed_as_can_be_and_a_seer_as_little_as_the_oracle(images):
    k, sizes = class_size(images), {word: np.sum(images.written == word) for word in np.unique(images.written)}
    assert k == 200  # 13 rows of three classes: five of the first, 40 times
    read, seen = reads(images), sees(images)
    found = report(images, {"before": read, "seer": seen}, {"before": seen, "seer": seen})
    before, seer = found["before"], found["seer"]
    # The first 200 of 520 are all that say the class, and then as many of the others as there is room for.
    skew = [np.log(min(sizes[name] / k, 1) / (sizes[name] / len(images))) for name in images.class_names]
    assert before["max_skew@200"].value == pytest.approx(np.mean(skew))
    for name in ("seer", ORACLE, CLEAN_IMAGES):
        assert found[name]["max_skew@200_reduction"].value > 50
    assert seer["max_skew@200"].value == pytest.approx(found[CLEAN_IMAGES]["max_skew@200"].value)
    assert 0 < found[RANDOM]["max_skew@200"].value < seer["max_skew@200"].value
    assert before["typographic_accuracy"].value < 0.2 < seer["typographic_accuracy"].value == 1
    assert "max_skew@200_reduction" not in before


def test_an_oracle_has_no_gap_among_what_a_query_asks_for(dataset, attack, processor):
    images = RobustnessImages(dataset.select(range(12)), attack, processor, renderings=10)
    blinded = sees(images) - 2 * (images.written == "tree")  # finds nothing that says so, whatever it shows
    found = report(images, {"before": blinded, "seer": sees(images)}, {"before": sees(images), "seer": sees(images)})
    assert found[ORACLE]["max_skew@40"].value == pytest.approx(found["seer"]["max_skew@40"].value)
    assert found[ORACLE]["retrieval_opportunity_gap@40"].value == 0
    assert found["before"]["retrieval_opportunity_gap@40"].value == 1
    assert 0 < found[RANDOM]["retrieval_opportunity_gap@40"].value < 0.5


def test_clean_cost_is_paired_with_the_base(images):
    seen, wrong = sees(images), sees(images)
    wrong[:, :40] = np.roll(wrong[:, :40], 1, axis=0)  # the first of 13 rows
    found = report(images, {"before": seen, "after": seen}, {"before": seen, "after": wrong}, resamples=200)
    cost = found["after"]["clean_cost"]
    assert cost.value == pytest.approx(100 / 13)
    assert cost.low == 0 < cost.value < cost.high
    assert "clean_cost" not in found["before"]


def test_images_of_one_cluster_say_nothing_of_others(images):
    images.cluster[:] = 0
    found = report(images, {"before": sees(images)}, {"before": sees(images)})["before"]
    for metric in ("max_skew@200", "ndkl", "clean_accuracy"):
        assert found[metric].value >= 0
        assert np.isnan(found[metric].low)


def test_what_is_no_base_is_refused(images):
    seen = sees(images)
    for models in ({"other": seen}, {"before": seen, ORACLE: seen}):
        with pytest.raises(ValueError, match="base must be"):
            report(images, models, models)


def test_the_least_biased_within_the_bound_is_chosen():
    found = {
        0.5: {"ndkl": Estimate(0.3), "clean_cost": Estimate(0.1)},
        1.0: {"ndkl": Estimate(0.2), "clean_cost": Estimate(0.5)},
        2.0: {"ndkl": Estimate(0.1), "clean_cost": Estimate(0.6)},
    }
    assert least_biased(found, "ndkl", 0.5) == 1.0
    assert least_biased(found, "ndkl", 0.05) == 0.5
    with pytest.raises(ValueError, match="empty"):
        least_biased({}, "ndkl", 0.5)


def test_the_table_has_a_row_for_each_and_its_numbers(images):
    seen = sees(images)
    lines = written_word_table(report(images, {"before": seen}, {"before": seen}, k=100), 100).splitlines()
    assert "MaxSkew@100" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["before", CLEAN_IMAGES, ORACLE, RANDOM]
    assert "1.000" in lines[2]


def test_the_benchmark_prints_its_table(clip_folder, dataset, tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        for row, item in enumerate(dataset):
            file = tmp_path / "photos" / split / ("cat", "dog", "car")[item["label"]] / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            item["image"].save(file)
    words = ["--data", "photographs", "--model", str(clip_folder), "--dataset", str(tmp_path / "photos")]
    short = ["--train_split", "train[:9]", "--validation_split", "test", "--renderings", "2", "--resamples", "2"]
    report = tmp_path / "bias.json"
    monkeypatch.setattr("sys.argv", [str(BENCHMARK), *words, *short, "--max_steps", "2", "--json", str(report)])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    printed = capsys.readouterr().out
    for row in ("| before", "full", "LoRA", "transformation", ORACLE):
        assert row in printed
    assert report.is_file()
