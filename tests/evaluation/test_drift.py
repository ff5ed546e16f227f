"""Drift against sums written out one image and one text at a time, in Python's own floats."""

import math

import numpy as np
import pytest
import torch
from datasets import Image
from scenes import make_model

from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.interpolation import interpolate

TEXTS = ["a photo of a cat", "a photo of a tree", "the sea", "a dog"]


@pytest.fixture
def models(model, other_model):
    """A base and a model that is near it, so that some of their answers are the same."""
    return {"base": model, "aligned": interpolate(model, other_model, 0.2)}


def probabilities(model, processor, dataset, texts=TEXTS):
    """Probabilities of the texts for each image, from the model's own logits."""
    inputs = processor(text=texts, images=[row["image"] for row in dataset], return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    rows = []
    for logits in outputs.logits_per_image.double().tolist():
        total = math.fsum(math.exp(logit - max(logits)) for logit in logits)
        rows.append([math.exp(logit - max(logits)) / total for logit in logits])
    return rows, outputs.image_embeds


def test_every_metric_against_a_plain_sum(models, processor, dataset):
    evaluator = DriftEvaluator(dataset, processor, TEXTS, resamples=200)
    found = evaluator(models, "base", disable_tqdm=True)
    was, was_embeds = probabilities(models["base"], processor, dataset)
    now, now_embeds = probabilities(models["aligned"], processor, dataset)
    kl = [sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in zip(was, now, strict=True)]
    same = [p.index(max(p)) == q.index(max(q)) for p, q in zip(was, now, strict=True)]
    cosine = torch.nn.functional.cosine_similarity(was_embeds, now_embeds).mean().item()
    aligned = found["aligned"]
    assert aligned["kl"].value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert aligned["agreement"].value == sum(same) / len(same)
    assert 0 < aligned["agreement"].value < 1
    assert aligned["cosine"].value == pytest.approx(cosine, abs=1e-5)
    assert all(estimate.low < estimate.value < estimate.high for estimate in aligned.values())
    assert found["base"] == {}
    assert (evaluator.primary_metric, evaluator.greater_is_better) == ("kl", False)


def test_a_model_has_not_moved_from_itself(model, processor, dataset):
    measured = DriftEvaluator(dataset, processor, TEXTS).measure({"model": model}, disable_tqdm=True)
    evaluator = DriftEvaluator(dataset, processor, TEXTS, resamples=5)
    found = evaluator.report({"base": measured["model"], "aligned": measured["model"]}, "base", 5)["aligned"]
    assert [found[metric].value for metric in ("kl", "agreement")] == [0, 1]
    assert found["cosine"].value == pytest.approx(1, abs=1e-6)


def test_the_logit_scale_is_part_of_the_model(model, processor, dataset):
    sharper = make_model()
    sharper.logit_scale.data += 1
    found = DriftEvaluator(dataset, processor, TEXTS)({"base": model, "sharper": sharper}, "base", disable_tqdm=True)
    assert found["sharper"]["kl"].value > 0.01
    assert found["sharper"]["agreement"].value == 1


def test_neither_batches_nor_parts_nor_companions_change_the_numbers(models, processor, dataset, monkeypatch):
    whole = DriftEvaluator(dataset, processor, TEXTS, resamples=20)(models, "base", disable_tqdm=True)["aligned"]
    evaluator = DriftEvaluator(dataset, processor, TEXTS, batch_size=5, num_workers=1, resamples=20)
    monkeypatch.setattr("clip_po.evaluation.drift._CELLS_AT_ONCE", 3 * len(TEXTS))
    apart = {}
    for name, model in models.items():
        apart |= evaluator.measure({name: model}, disable_tqdm=True)
    for metric, estimate in evaluator.report(apart, "base", 20)["aligned"].items():
        assert estimate.as_dict() == pytest.approx(whole[metric].as_dict(), abs=1e-5)


def test_texts_with_the_same_token_ids_count_once(models, processor, dataset):
    twice = [TEXTS[0], "A  photo of a CAT", *TEXTS[1:], TEXTS[2].upper()]
    evaluator = DriftEvaluator(dataset, processor, twice, resamples=5)
    measured = evaluator.measure(models, disable_tqdm=True)
    assert list(measured["base"].texts) == TEXTS
    once = DriftEvaluator(dataset, processor, TEXTS, resamples=5)(models, "base", disable_tqdm=True)
    assert evaluator.report(measured, "base", 5) == once


def test_embeddings_of_another_size_have_no_cosine(model, processor, dataset):
    narrow = make_model()
    for name in ("visual_projection", "text_projection"):
        projection = getattr(narrow, name)
        projection.weight = torch.nn.Parameter(projection.weight[:4])
    narrow.config.projection_dim = 4
    found = DriftEvaluator(dataset, processor, TEXTS)({"base": model, "narrow": narrow}, "base", disable_tqdm=True)
    assert found["narrow"].keys() == {"kl", "agreement"}


def test_related_rows_are_drawn_together(models, processor, dataset):
    alone, together = (
        DriftEvaluator(dataset, processor, TEXTS, cluster_column=column)(models, "base", disable_tqdm=True)["aligned"]
        for column in (None, "scene")
    )
    assert alone["kl"].value == pytest.approx(together["kl"].value)
    assert alone["kl"] != together["kl"]


def test_the_upper_end_of_a_ninety_percent_interval_is_a_one_sided_bound(models, processor, dataset):
    evaluator = DriftEvaluator(dataset, processor, TEXTS)
    measured = evaluator.measure(models, disable_tqdm=True)
    wide, narrow = (evaluator.report(measured, "base", 1000, level)["aligned"]["kl"] for level in (0.95, 0.9))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_measurements_that_do_not_belong_together_are_refused(models, processor, dataset):
    first = DriftEvaluator(dataset, processor, TEXTS).measure({"base": models["base"]}, disable_tqdm=True)
    other = DriftEvaluator(dataset, processor, TEXTS[:3])
    measured = first | other.measure({"aligned": models["aligned"]}, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"13 images and 4 texts.*13 images and 3 texts"):
        other.report(measured, "base", 5)
    with pytest.raises(ValueError, match="'before', which is none of the models"):
        other.report(measured, "before", 5)
    assert other.report(measured, None, 5) == {"base": {}, "aligned": {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a cat"}, "texts must be a list of at least two texts, got 'a cat'"),
        ({"texts": ["a cat"]}, "at least two"),
        ({"image_column": "photo"}, "photo"),
        ({"cluster_column": "person"}, "'person' is not a column"),
    ],
)
def test_wrong_arguments_are_refused_before_any_measurement(processor, dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        DriftEvaluator(dataset, processor, **{"texts": TEXTS, **arguments})


def test_the_open_vocabulary_has_each_spelling_once():
    texts = open_vocabulary("a photo of a {}", ["cat", "Umbrella", "polar_bear", "Polar bear"])
    assert len(texts) == len(EVERYDAY_WORDS) + 2
    assert {"a photo of a cat", "a photo of a Umbrella", "a photo of a Polar bear"} <= set(texts)
    assert "a photo of a umbrella" not in texts
    assert open_vocabulary("{}") == list(EVERYDAY_WORDS)
    with pytest.raises(ValueError, match="exactly one"):
        open_vocabulary("a photo")


def test_two_processes_measure_what_one_does(models, processor, dataset, two_processes, tmp_path):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path)
    dataset.cast_column("image", Image()).save_to_disk(tmp_path / "data")
    two_processes.run(SCRIPT, tmp_path)
    alone = DriftEvaluator(dataset, processor, TEXTS, batch_size=2).measure(models, disable_tqdm=True)
    for rank in range(2):
        for name, embeds in alone.items():
            shared = np.load(tmp_path / f"{name}-{rank}.npy")
            np.testing.assert_allclose(shared, embeds.image_embeds, atol=1e-5)


SCRIPT = f"""
import sys
import numpy as np
from accelerate import Accelerator
from datasets import load_from_disk
from transformers import CLIPModel, CLIPProcessor
from clip_po.evaluation.drift import DriftEvaluator

folder, accelerator = sys.argv[1], Accelerator(cpu=True)
models = {{name: CLIPModel.from_pretrained(f"{{folder}}/{{name}}") for name in ("base", "aligned")}}
evaluator = DriftEvaluator(load_from_disk(f"{{folder}}/data"), CLIPProcessor.from_pretrained(folder), {TEXTS!r})
for name, found in evaluator.measure(models, accelerator=accelerator, disable_tqdm=True).items():
    np.save(f"{{folder}}/{{name}}-{{accelerator.process_index}}.npy", found.image_embeds)
"""
