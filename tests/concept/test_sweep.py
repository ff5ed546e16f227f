"""A sweep over t answers as the folded models do, from towers that ran once; a choice holds what it promises."""

import numpy as np
import pytest
import torch
from samples import SCENE_CLASSES, make_scenes
from scenes import make_model, make_processor

from clip_po.concept.sweep import (
    ScalePoint,
    choose_neutral,
    choose_within,
    embed_variants,
    measure_transform,
    scale_table,
    sweep_scales,
)
from clip_po.concept.transform import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.evaluation.bootstrap import Estimate
from clip_po.evaluation.robustness import RobustnessImages, evaluate_robustness, robustness_report

TEMPLATES = ["a photo of a {}", "the {}"]


def randomized(towers="shared", output_dim=None):
    torch.manual_seed(3)
    transform = ConceptTransform(8, output_dim, towers)
    with torch.no_grad():
        for weight in transform.parameters():
            weight += 0.4 * torch.randn_like(weight)
    return transform


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def images(processor):
    attack = TypographicAttack(words=[*SCENE_CLASSES, "tree"], size=(0.3, 0.4), min_side=32)
    return RobustnessImages(make_scenes(40), attack, processor, cluster_column="scene", renderings=2)


@pytest.fixture
def embeds(model, images):
    return embed_variants(model, images, TEMPLATES, batch_size=16, disable_tqdm=True)


@pytest.mark.parametrize(("towers", "path"), [("shared", "singular"), ("each", "straight"), ("image", "straight")])
def test_a_sweep_measures_what_the_folded_models_answer(model, images, embeds, towers, path):
    transform, ts = randomized(towers), (-1.0, 0.0, 0.5, 2.0)
    points = sweep_scales(embeds, transform, ts, path)
    folded = {f"{t:g}": transform.fold_into(model, t, path) for t in ts}
    answers = evaluate_robustness({"base": model, **folded}, images, TEMPLATES, disable_tqdm=True)
    assert [point.t for point in points] == list(ts)
    for point in points:
        report = robustness_report(answers, f"{point.t:g}", "base")
        found = point.metrics()
        assert {name: found[name] for name in found if name in report} == {
            name: report[name] for name in ("clean_accuracy", "typographic_accuracy", "fooled", "clean_cost")
        }
        # Some words name no class, so that the two shares are of different images.
        assert point.difference.value == pytest.approx(100 * (point.right.value - point.reading.value))
        assert point.difference.low < point.difference.value < point.difference.high
        upper = robustness_report(answers, f"{point.t:g}", "base", confidence=0.9)["clean_cost"].high
        assert point.clean_cost_upper == upper
    assert points[1].clean_cost == Estimate(0.0, 0.0, 0.0)
    assert len({point.reading.value for point in points}) > 1


def test_the_towers_run_once_for_all_scales(model, images):
    calls = []
    for tower in (model.vision_model, model.text_model):
        tower.register_forward_hook(lambda module, *_: calls.append(module))
    embeds = embed_variants(model, images, TEMPLATES[:1], batch_size=80, disable_tqdm=True)
    sweep_scales(embeds, randomized(), resamples=2)
    assert calls == [model.text_model, model.vision_model, model.vision_model]


def test_fewer_rows_than_columns_are_measured_as_they_are_and_not_scaled(model, images, embeds):
    transform = randomized(output_dim=3)
    answers = evaluate_robustness({"folded": transform.fold_into(model)}, images, TEMPLATES, disable_tqdm=True)
    said = embeds.answers(transform)
    assert {name: said[name].tolist() for name in said} == {
        name: answers.predictions_of("folded")[name].tolist() for name in said
    }
    assert measure_transform(embeds, transform, resamples=2).t == 1.0
    with pytest.raises(ValueError, match="output_dim"):
        sweep_scales(embeds, transform, [0.5])


def test_intervals_are_clustered(model, images, embeds):
    alone = RobustnessImages(make_scenes(40), images.attack, images.processor, renderings=2)
    of_rows = measure_transform(embed_variants(model, alone, TEMPLATES, disable_tqdm=True), randomized())
    assert measure_transform(embeds, randomized()).right.value == of_rows.right.value
    assert measure_transform(embeds, randomized()).right != of_rows.right


def test_words_that_name_no_class_are_refused(model, processor):
    attack = TypographicAttack(words=["tree", "house"], min_side=32)
    with pytest.raises(ValueError, match="class"):
        embed_variants(model, RobustnessImages(make_scenes(4), attack, processor), TEMPLATES)


def point(t, reading, right, cost=0.0, upper=None):
    difference = Estimate(100 * (right - reading))
    upper = cost if upper is None else upper
    return ScalePoint(t, Estimate(reading), Estimate(right), difference, Estimate(0.9), Estimate(cost), upper)


def test_neutral_is_the_crossing_nearest_to_the_original():
    # Far out all answers are at chance and meet again.
    points = [point(-4, 0.1, 0.1), point(-1, 0.9, 0.1), point(0, 0.8, 0.2), point(0.5, 0.45, 0.5), point(1, 0.1, 0.8)]
    assert choose_neutral(points[::-1]).t == 0.5
    assert choose_neutral([point(-1, 0.2, 0.7), point(-0.5, 0.5, 0.6), point(0, 0.8, 0.2)]).t == -0.5
    with pytest.raises(ValueError, match=r"t=1, -20\.0 points"):
        choose_neutral([point(0, 0.9, 0.1), point(1, 0.5, 0.3)])


def test_the_least_reading_that_is_sure_to_hold_the_bound_is_chosen():
    points = [
        point(0, 0.8, 0.2),
        point(1, 0.3, 0.6, 0.1, 0.4),
        point(2, 0.1, 0.8, 0.4, 0.9),
        point(3, 0.3, 0.7, 0.2, 0.5),
    ]
    assert choose_within(points, 0.5).t == 3
    assert choose_within(points, 1.0).t == 2
    assert choose_within(points, 0.0).t == 0
    with pytest.raises(ValueError, match="t = 0"):
        choose_within(points[2:3], 0.5)
    with pytest.raises(ValueError, match="max_clean_cost"):
        choose_within(points, -1.0)


def test_the_table_has_a_row_a_point(embeds):
    points = sweep_scales(embeds, randomized(), [0.0, 1.0], resamples=2)
    table = scale_table({f"{p.t:g}": p for p in points}).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| 0 ")
    assert ".000 [.000, .000]" in table[2]
    assert np.isclose(points[0].clean_cost_upper, 0)
    with pytest.raises(ValueError, match="ts is empty"):
        sweep_scales(embeds, randomized(), [])
