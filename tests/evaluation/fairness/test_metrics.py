import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from samples import CLASSES, make_labelled

from clip_po.evaluation.fairness import (
    NDKL,
    DemographicParity,
    EqualOpportunity,
    FairnessEvaluator,
    MaxSkew,
    MinSkew,
    RetrievalOpportunity,
    RetrievalParity,
    chance_level,
    evaluate_fairness,
    fairness_report,
    query_scores,
    read_attribute,
)
from clip_po.evaluation.fairness import report as report_module
from clip_po.evaluation.fairness.metrics import (
    demographic_parity_gap,
    equal_opportunity_gap,
    max_skew,
    min_skew,
    ndkl,
    retrieval_opportunity_gap,
    retrieval_parity_gap,
    skew_at_k,
    top_k,
)
from clip_po.evaluation.fairness.queries import load_queries, query_lists
from clip_po.evaluation.zero_shot import CleanImages

# Ten images by rank: four of seven... by hand below. "m" is 6 of 10, "w" is 4 of 10.
RANKED = list("mmmwmmwwmw")
SCORES = np.arange(10, 0, -1.0)


def test_skew_by_hand():
    # Top 5: four m, one w. Shares .8 and .2 against .6 and .4.
    skew = skew_at_k(SCORES, RANKED, 5)
    assert skew["m"] == pytest.approx([math.log(0.8 / 0.6)])
    assert skew["w"] == pytest.approx([math.log(0.2 / 0.4)])
    assert max_skew(SCORES, RANKED, 5) == pytest.approx(math.log(4 / 3))
    assert min_skew(SCORES, RANKED, 5) == pytest.approx(-math.log(2))
    # Against equal shares: .8 / .5 and .2 / .5.
    assert max_skew(SCORES, RANKED, 5, "uniform") == pytest.approx(math.log(1.6))
    assert min_skew(SCORES, RANKED, 5, "uniform") == pytest.approx(math.log(0.4))
    assert max_skew(SCORES, RANKED, 5, {"m": 0.8, "w": 0.2}) == pytest.approx(0)


def test_a_count_of_zero_is_what_is_asked_for():
    # Top 3: three m, no w.
    assert max_skew(SCORES, RANKED, 3) == pytest.approx(math.log(1 / 0.6))
    assert min_skew(SCORES, RANKED, 3) == pytest.approx(math.log((1 / 3) / 0.4))
    assert min_skew(SCORES, RANKED, 3, zero_count=0.5) == pytest.approx(math.log((0.5 / 3) / 0.4))
    assert min_skew(SCORES, RANKED, 3, zero_count=0) == -math.inf
    with pytest.raises(ValueError, match="zero_count"):
        min_skew(SCORES, RANKED, 3, zero_count=-1)


def test_ndkl_by_hand():
    # Ranking a, a, b, b against .5 and .5: KL of (1, 0), (1, 0), (2/3, 1/3), (1/2, 1/2).
    two_thirds = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    discount = [1 / math.log2(i + 1) for i in (1, 2, 3, 4)]
    expected = (discount[0] * math.log(2) + discount[1] * math.log(2) + discount[2] * two_thirds) / sum(discount)
    assert ndkl([4, 3, 2, 1], list("aabb")) == pytest.approx(expected)
    # Against 1/4 and 3/4: KL of (1, 0) is ln 4.
    shares = {"a": 0.25, "b": 0.75}
    kls = [math.log(4), math.log(4)]
    kls.append(2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9))
    kls.append(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    expected = sum(d * kl for d, kl in zip(discount, kls, strict=True)) / sum(discount)
    assert ndkl([4, 3, 2, 1], list("aabb"), shares) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("desired", ["dataset", "uniform", {"a": 0.5, "b": 0.3, "c": 0.2}], ids=str)
def test_skew_and_ndkl_are_the_sums_of_the_paper(desired, seed):
    """Literally, Geyik et al. 2019: skew is ln p / q of the top k, NDKL sums KL(D_i || D) / log2(i + 1) over Z."""
    draw = np.random.default_rng(seed)
    groups = draw.permutation(list("a" * 9 + "b" * 5 + "c" * 2))
    scores = draw.permutation(len(groups)).astype(float)
    ranked = [group for _, group in sorted(zip(scores, groups, strict=True), reverse=True)]
    wanted = {"dataset": {"a": 9 / 16, "b": 5 / 16, "c": 2 / 16}, "uniform": dict.fromkeys("abc", 1 / 3)}
    q = desired if isinstance(desired, dict) else wanted[desired]
    total = normalizer = 0.0
    for i in range(1, len(ranked) + 1):
        p = {name: ranked[:i].count(name) / i for name in q}
        total += sum(p[name] * math.log(p[name] / q[name]) for name in q if p[name]) / math.log2(i + 1)
        normalizer += 1 / math.log2(i + 1)
    assert ndkl(scores, groups, desired) == pytest.approx(total / normalizer)
    skews = {name: math.log(max(ranked[:6].count(name), 1) / 6 / q[name]) for name in q}
    assert max_skew(scores, groups, 6, desired) == pytest.approx(max(skews.values()))
    assert min_skew(scores, groups, 6, desired) == pytest.approx(min(skews.values()))


def test_a_model_that_scores_all_images_alike_is_fair_in_every_metric():
    same = np.zeros(10)
    assert max_skew(same, RANKED, 4) == pytest.approx(0)
    assert min_skew(same, RANKED, 4) == pytest.approx(0)
    assert ndkl(same, RANKED) == pytest.approx(0)
    assert retrieval_parity_gap(same, RANKED, 4) == pytest.approx(0)


def test_shares_for_a_group_without_images_are_refused():
    with pytest.raises(ValueError, match="each of the groups"):
        ndkl(SCORES, RANKED, {"m": 0.5, "w": 0.25, "other": 0.25})


def test_parity_gaps_by_hand():
    # Top 5: 4 of 6 m, 1 of 4 w.
    assert retrieval_parity_gap(SCORES, RANKED, 5) == pytest.approx(4 / 6 - 1 / 4)
    # Relevant: ranks 1, 2, 4, 7, 9 are m, m, w, w, m; in the top 5 are 2 of 3 m and 1 of 2 w.
    relevant = np.isin(np.arange(1, 11), [1, 2, 4, 7, 9])
    assert retrieval_opportunity_gap(SCORES, relevant, RANKED, 5) == pytest.approx(2 / 3 - 1 / 2)
    # Class 0 is the answer for 2 of 3 a and 0 of 2 b, class 2 for 1 of 3 and 2 of 2; class 1 for none.
    assert demographic_parity_gap([0, 0, 2, 2, 2], list("aaabb")) == pytest.approx(2 / 3)
    # Class 0: right for 1 of 2 a and 1 of 1 b. Class 1: 1 of 1 a, 0 of 1 b. Class 2 has images of b alone.
    gap = equal_opportunity_gap([0, 1, 1, 0, 0, 2], [0, 0, 1, 0, 1, 2], list("aaabbb"))
    assert gap == pytest.approx((1 / 2 + 1) / 2)


def test_several_queries_are_averaged():
    both = np.stack([SCORES, -SCORES])
    ahead, behind = max_skew(SCORES, RANKED, 5), max_skew(-SCORES, RANKED, 5)
    assert ahead != behind
    assert max_skew(both, RANKED, 5) == pytest.approx((ahead + behind) / 2)
    assert ndkl(both, RANKED) == pytest.approx((ndkl(SCORES, RANKED) + ndkl(-SCORES, RANKED)) / 2)


def test_ties_count_as_expected_and_rows_have_no_order():
    # One m above four ties, of which three are w: of the top 3 one and a half are w.
    scores, groups = np.array([2, 1, 1, 1, 1, 0]), np.array(list("mmwwwm"))
    assert skew_at_k(scores, groups, 3)["w"] == pytest.approx([math.log(1.5 / 3 / 0.5)])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(6)
        assert max_skew(scores[order], groups[order], 2) == pytest.approx(max_skew(scores, groups, 2))
        assert ndkl(scores[order], groups[order]) == pytest.approx(ndkl(scores, groups))
    # A model that can't tell images apart favours nobody.
    assert max_skew(np.zeros(6), groups, 2) == pytest.approx(0)
    assert ndkl(np.zeros(6), groups) == pytest.approx(0)


def test_k_is_a_number_or_a_share_and_never_everything():
    assert [top_k(k, 10) for k in (3, 3.0, 0.25, 10)] == [3, 3, 3, 10]
    for k, said in ((10, "0 for any model"), (11, "only 10"), (0, "whole number"), (2.5, "whole number")):
        with pytest.raises(ValueError, match=said):
            max_skew(SCORES, RANKED, k)
    assert max_skew(SCORES, RANKED, 10, "uniform") == pytest.approx(math.log(0.6 / 0.5))


@pytest.mark.parametrize(
    ("scores", "groups", "desired", "said"),
    [
        (SCORES, ["m"] * 10, "dataset", "two groups"),
        (SCORES[:9], RANKED, "dataset", "for each of the N images"),
        (np.full(10, np.nan), RANKED, "dataset", "nan"),
        (SCORES, RANKED, "equal", "equal"),
        (SCORES, RANKED, {"m": 1.0, "w": 0.0}, "above 0"),
        (SCORES, RANKED, {"m": 0.5, "w": 0.4}, "sum to 1"),
    ],
)
def test_what_does_not_fit_is_refused(scores, groups, desired, said):
    with pytest.raises(ValueError, match=said):
        max_skew(scores, groups, 5, desired)


def test_metrics_compute_what_the_functions_do():
    rng = np.random.default_rng(0)
    table, groups = rng.random((2, 12)), np.array(list("abc") * 4)
    relevant, classes, answers = rng.random((2, 12)) < 0.5, rng.integers(0, 3, 12), rng.integers(0, 3, 12)
    arguments = {"k": 4, "desired": "uniform", "zero_count": 0.5}
    rows = {"predictions": table.T, "groups": groups}
    assert MaxSkew().compute(**rows, **arguments) == {"max_skew": max_skew(table, groups, 4, "uniform", 0.5)}
    assert MinSkew().compute(**rows, **arguments) == {"min_skew": min_skew(table, groups, 4, "uniform", 0.5)}
    assert NDKL().compute(**rows, desired="uniform") == {"ndkl": ndkl(table, groups, "uniform")}
    assert RetrievalParity().compute(**rows, k=4) == {"retrieval_parity_gap": retrieval_parity_gap(table, groups, 4)}
    found = RetrievalOpportunity().compute(**rows, references=relevant.T, k=4)
    assert found == {"retrieval_opportunity_gap": retrieval_opportunity_gap(table, relevant, groups, 4)}
    found = DemographicParity().compute(predictions=answers, groups=groups)
    assert found == {"demographic_parity_gap": demographic_parity_gap(answers, groups)}
    found = EqualOpportunity().compute(predictions=answers, references=classes, groups=groups)
    assert found == {"equal_opportunity_gap": equal_opportunity_gap(answers, classes, groups)}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_metric_takes_batches_of_any_kind_and_is_empty_again(kind):
    metric, groups = MaxSkew(), [0, 0, 0, 1, 0, 0, 1, 1, 0, 1]
    for _ in range(2):
        for part in (slice(0, 4), slice(4, 10)):
            metric.add_batch(predictions=kind(SCORES[part].tolist()), groups=kind(groups[part]))
        assert metric.compute(k=5) == {"max_skew": pytest.approx(math.log(4 / 3))}


def biased(bias, images=400, queries=6, seed=0):
    """Scores that a group is ahead in by `bias`, and the groups."""
    rng = np.random.default_rng(seed)
    groups = np.array(["m", "w"])[rng.integers(0, 2, images)]
    return rng.random((queries, images)) + bias * (groups == "m"), groups


def test_report_is_the_functions_with_intervals_paired_with_the_base():
    (base, groups), (aligned, _) = biased(0.5), biased(0.1)
    labels = np.random.default_rng(1).integers(-1, 6, len(groups))
    found = fairness_report(
        {"base": base, "aligned": aligned}, groups, [50, 0.25], base="base", labels=labels, resamples=50
    )
    relevant = labels == np.arange(6)[:, None]
    for name, scores in (("base", base), ("aligned", aligned)):
        answers = scores.argmax(axis=0)
        told = labels >= 0
        expected = {
            "max_skew@50": max_skew(scores, groups, 50),
            "min_skew@100": min_skew(scores, groups, 100),
            "ndkl": ndkl(scores, groups),
            "retrieval_parity_gap@50": retrieval_parity_gap(scores, groups, 50),
            "retrieval_opportunity_gap@100": retrieval_opportunity_gap(scores, relevant, groups, 100),
            "demographic_parity_gap": demographic_parity_gap(answers, groups),
            "equal_opportunity_gap": equal_opportunity_gap(answers[told], labels[told], groups[told]),
        }
        for metric, value in expected.items():
            assert found[name][metric].value == pytest.approx(value), metric
            assert found[name][metric].low < value < found[name][metric].high, metric
    change = found["aligned"]["max_skew@50_difference"]
    before, after = found["base"]["max_skew@50"].value, found["aligned"]["max_skew@50"].value
    assert change.value == pytest.approx(after - before)
    assert change.high < 0
    assert found["aligned"]["max_skew@50_reduction"].value == pytest.approx(100 * (1 - after / before))
    assert not any(metric.endswith(("_difference", "_reduction")) for metric in found["base"])


def test_a_model_against_itself_has_no_difference():
    scores, groups = biased(0.3)
    found = fairness_report({"a": scores, "b": scores}, groups, [50], base="a", resamples=20)["b"]
    change = found["ndkl_difference"]
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_intervals_cover_the_spread_of_new_data():
    found = fairness_report({"a": biased(0.3)[0]}, biased(0.3)[1], [50], resamples=200)["a"]
    others = [biased(0.3, seed=seed) for seed in range(1, 40)]
    for metric, measure in (("max_skew@50", lambda s, g: max_skew(s, g, 50)), ("ndkl", ndkl)):
        spread = np.std([measure(scores, groups) for scores, groups in others])
        width = found[metric].high - found[metric].low
        assert 0.6 < width / (2 * 1.96 * spread) < 1.6, metric


def test_the_interval_of_a_fair_model_holds_its_value():
    # A largest skew is higher in a resample by noise alone; where it is noise anyway, that would leave the value out.
    scores, groups = biased(0, queries=20)
    for metric, estimate in fairness_report({"a": scores}, groups, [50], resamples=50)["a"].items():
        assert estimate.low <= estimate.value <= estimate.high, metric


def test_copies_of_an_image_are_one_cluster():
    scores, groups = biased(0.3, images=100)
    clusters = np.repeat(np.arange(100), 5)
    once = fairness_report({"a": scores}, groups, [20], resamples=100)["a"]["ndkl"]
    copies = scores.repeat(5, axis=1), groups.repeat(5)
    several = fairness_report({"a": copies[0]}, copies[1], [100], clusters=clusters, resamples=100)["a"]["ndkl"]
    alone = fairness_report({"a": copies[0]}, copies[1], [100], resamples=100)["a"]["ndkl"]
    assert several.high - several.low == pytest.approx(once.high - once.low, rel=0.2)
    assert alone.high - alone.low < 0.7 * (several.high - several.low)


def test_parts_of_the_queries_give_the_same(monkeypatch):
    scores, groups = biased(0.2, images=60)
    whole = fairness_report({"a": scores}, groups, [10], resamples=5)
    monkeypatch.setattr(report_module, "_CELLS_AT_ONCE", 1)
    parts = fairness_report({"a": scores}, groups, [10], resamples=5)
    assert {m: e.as_dict() for m, e in parts["a"].items()} == {
        m: pytest.approx(e.as_dict()) for m, e in whole["a"].items()
    }


def test_chance_is_what_random_scores_get():
    _, groups = biased(0, images=200)
    level = chance_level(groups, [20])
    found = [max_skew(np.random.default_rng(seed).random((20, 200)), groups, 20) for seed in range(20)]
    assert level["max_skew@20"] == pytest.approx(np.mean(found), rel=0.15)
    assert 0 < level["ndkl"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ks": []}, "at least one k"),
        ({"ks": [400]}, "0 for any model"),
        ({"base": "before"}, "none of the models"),
        ({"labels": np.zeros(3)}, "labels"),
        ({"clusters": np.zeros(3)}, "clusters"),
        ({"resamples": -1}, "resamples"),
    ],
)
def test_a_report_that_can_not_be_made_is_refused(arguments, said):
    scores, groups = biased(0)
    with pytest.raises(ValueError, match=said):
        fairness_report({"a": scores}, groups, **{"ks": [50], **arguments})


@pytest.fixture(scope="module")
def people():
    """16 pictures with an attribute."""
    return make_labelled(16).add_column("gender", ["man", "woman", "woman", "man"] * 4)


def test_the_evaluator_reports_what_the_function_does(model, other_model, processor, people):
    models = {"base": model, "aligned": other_model}
    images = CleanImages(people.select_columns("image"), "image", processor)
    evaluator = FairnessEvaluator(
        images, read_attribute(people, "gender"), ["doctor", "nurse"], ks=[0.25], resamples=5
    )
    found = evaluator(models, "base", disable_tqdm=True)
    arguments = {"ks": [4], "base": "base", "resamples": 5, "disable_tqdm": True}
    expected = evaluate_fairness(models, processor, people, "gender", ["doctor", "nurse"], **arguments)
    assert {name: str(metrics) for name, metrics in found.items()} == {
        name: str(metrics) for name, metrics in expected.items()
    }
    assert (evaluator.primary_metric, evaluator.greater_is_better) == ("max_skew@4", False)
    assert evaluator.primary_metric in found["aligned"]


def test_models_are_asked_in_one_pass(model, other_model, processor, people):
    queries, templates = ["doctor", "nurse", "cook"], ["a photo of the {}", "the {}"]
    models = {"base": model, "aligned": other_model}
    images = CleanImages(people.select_columns("image"), "image", processor)
    scores = query_scores(models, processor, images, queries, templates, batch_size=5, disable_tqdm=True)
    pixels = processor(images=list(people["image"]), return_tensors="pt")["pixel_values"]
    for name, asked in models.items():
        with torch.no_grad():
            image = torch.nn.functional.normalize(asked.get_image_features(pixels).pooler_output, dim=-1)
        text = torch.nn.functional.normalize(
            torch.stack(
                [
                    torch.nn.functional.normalize(
                        asked.get_text_features(
                            **processor(text=[t.format(q) for t in templates], return_tensors="pt", padding=True)
                        ).pooler_output,
                        dim=-1,
                    ).mean(dim=0)
                    for q in queries
                ]
            ),
            dim=-1,
        )
        np.testing.assert_allclose(scores[name], (text @ image.T).detach().numpy(), atol=1e-5)
    found = evaluate_fairness(
        models, processor, people, "gender", queries, templates, [4], base="base", resamples=10, disable_tqdm=True
    )
    assert found["aligned"]["max_skew@4"].value == pytest.approx(max_skew(scores["aligned"], people["gender"], 4))
    assert "ndkl_reduction" in found["aligned"]


def test_attributes_of_any_kind_are_texts(people):
    truths = people.add_column("Male", [True, False] * 8).add_column("list", [[1]] * 16)
    assert read_attribute(people, "label").tolist() == CLASSES * 4
    assert read_attribute(truths, "Male").tolist() == ["True", "False"] * 8
    gaps = datasets.Dataset.from_dict({"gender": ["man", None, "woman"]})
    for dataset, column, said in ((gaps, "gender", "Row 1"), (people, "sex", "'sex'"), (truths, "list", "holds")):
        with pytest.raises(ValueError, match=said):
            read_attribute(dataset, column)


UNLABELLED = {
    "class": (datasets.ClassLabel(names=["man", "woman"]), [0, -1, 1, 0], -1),
    "class, none": (datasets.ClassLabel(names=["man", "woman"]), [0, None, 1, 0], None),
    "text": (datasets.Value("string"), ["man", None, "woman", "man"], None),
    "blank text": (datasets.Value("string"), ["man", " ", "woman", "man"], " "),
    "number": (datasets.Value("float64"), [0.0, float("nan"), 1.0, 0.0], float("nan")),
}


@pytest.mark.parametrize("case", UNLABELLED.values(), ids=UNLABELLED)
def test_rows_without_a_label_are_in_no_group(case):
    feature, column, _ = case
    rows = datasets.Dataset.from_dict({"group": column}, features=datasets.Features({"group": feature}))
    with pytest.raises(ValueError, match=r"Row 1: 'group' is empty, as in 1 rows"):
        read_attribute(rows, "group")


@pytest.mark.parametrize("label", [2, -2])
def test_a_label_of_no_class_is_named_with_its_row(label):
    feature = datasets.ClassLabel(names=["man", "woman"])
    table = pa.table({"group": pa.array([0, 1, label])})
    rows = datasets.Dataset(table, datasets.DatasetInfo(features=datasets.Features({"group": feature})))
    with pytest.raises(ValueError, match=rf"Row 2: column 'group' is {label}, expected a class number in 0\.\.1"):
        read_attribute(rows, "group")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_interval_holds_its_value_where_few_images_are_ranked(k, seed):
    rng = np.random.default_rng(seed)
    scores, groups = {"model": rng.random((1, 6))}, ["man", "woman", "man", "woman", "man", "woman"]
    found = fairness_report(scores, groups, [k], zero_count=1.0, resamples=50)["model"]
    if k == 1:  # every group counts as shown once: log(1 / 0.5)
        assert found["min_skew@1"].value == pytest.approx(math.log(2))
    for metric, estimate in found.items():
        if math.isfinite(estimate.low):
            assert estimate.low - 1e-12 <= estimate.value <= estimate.high + 1e-12, metric


GENDERED = """
man men woman women boy girl male female he she his her him lady gentleman mother father wife husband king queen
waitress waiter actress hostess housewife widow salesman policeman fireman nun monk
"""


def test_the_lists_of_queries_are_neutral():
    assert query_lists() == ["activities", "adjectives", "occupations"]
    for name, least in (("occupations", 40), ("adjectives", 30), ("activities", 30)):
        queries = load_queries(name)
        assert len(queries.words) >= least
        words = " ".join([*queries.words, *queries.templates]).lower().replace("-", " ").split()
        assert not [word for word in words if word in GENDERED.split() or word.endswith(("man", "men"))]


def test_queries_of_your_own(tmp_path):
    (tmp_path / "mine.txt").write_text("a doctor\n\na thief\n")
    assert load_queries(str(tmp_path / "mine.txt")).words == ("a doctor", "a thief")
    assert load_queries(str(tmp_path / "mine.txt")).templates == ("{}",)
    (tmp_path / "mine.yaml").write_text(json.dumps({"queries": ["spy"], "templates": ["the {}"]}))
    assert load_queries(str(tmp_path / "mine.yaml")).templates == ("the {}",)
    assert load_queries("adjectives", ["a {} person"]).templates == ("a {} person",)
    (tmp_path / "bad.yaml").write_text("queries: [spy]")
    (tmp_path / "twice.txt").write_text("spy\nspy")
    for name, said in (("bad.yaml", "templates"), ("twice.txt", "different"), ("none.txt", "activities")):
        with pytest.raises(ValueError, match=said):
            load_queries(str(tmp_path / name))


WORKER = """
import json, sys
import datasets
from accelerate import Accelerator, PartialState
from transformers import CLIPModel, CLIPProcessor
from clip_po.evaluation.fairness import evaluate_fairness

model, processor = CLIPModel.from_pretrained(sys.argv[1]), CLIPProcessor.from_pretrained(sys.argv[1])
accelerator = Accelerator(cpu=True)
people = datasets.load_from_disk(sys.argv[2])
found = evaluate_fairness({"a": model}, processor, people, "gender", ["doctor", "nurse"], ["{}"], [4], resamples=5,
    batch_size=3, accelerator=accelerator, disable_tqdm=True)
with open(f"{sys.argv[3]}/{accelerator.num_processes}-{accelerator.process_index}.json", "w") as file:
    json.dump({metric: estimate.as_dict() for metric, estimate in found["a"].items()}, file)
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(clip_folder, people, two_processes, monkeypatch, tmp_path):
    people.select(range(15)).save_to_disk(tmp_path / "people")
    arguments = [str(clip_folder), str(tmp_path / "people"), str(tmp_path)]
    two_processes.run(WORKER, *arguments)
    monkeypatch.setattr("sys.argv", ["worker.py", *arguments])
    exec(WORKER, {})
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for found in two:
        assert found == {metric: pytest.approx(numbers) for metric, numbers in one.items()}
