"""One pass gives what the evaluators of retention and drift give in one pass each."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from clip_po.cli.retention_sets import load_retention_sets
from clip_po.data.vocabulary import open_vocabulary
from clip_po.evaluation.drift import DriftEvaluator
from clip_po.evaluation.other_tasks import measure_set, set_scores
from clip_po.evaluation.retention import RetentionEvaluator, RetentionSet, scores_report

TEXTS = ["a photo of a cat", "the sea", "a tree"]


def test_one_pass_gives_both(model, other_model, processor, dataset):
    models = {"base": model, "aligned": other_model}
    known = RetentionSet(dataset, ["a {}", "the {}"])
    results = measure_set(models, processor, dataset, known, TEXTS, batch_size=5, disable_tqdm=True)
    label = np.array(dataset["label"])
    scores = {name: set_scores(label, found, results["base"]) for name, found in results.items()}
    found = scores_report({"rows": scores["aligned"]}, resamples=50)

    retention = RetentionEvaluator({"rows": known}, processor, resamples=50)(models, "base", disable_tqdm=True)
    drift = DriftEvaluator(dataset, processor, TEXTS, resamples=50)(models, "base", disable_tqdm=True)
    for metric, expected in (retention["aligned"] | drift["aligned"]).items():
        assert found[metric].as_dict() == pytest.approx(expected.as_dict(), abs=1e-6)
    assert set_scores(label, results["base"]).keys() == {"accuracy"}


def test_images_without_labels_have_drift_alone(model, other_model, processor, dataset):
    models = {"base": model, "aligned": other_model}
    results = measure_set(models, processor, dataset.select_columns("image"), None, TEXTS, disable_tqdm=True)
    assert set_scores(None, results["aligned"], results["base"]).keys() == {"kl", "agreement", "cosine"}
    assert set_scores(None, results["aligned"]) == {}


def test_a_metric_that_a_set_lacks_is_a_mean_over_the_others():
    """Sets of two and three images, of which the second has no labels."""
    scores = {"a": {"accuracy": np.array([0, 1]), "kl": np.array([1.0, 3.0])}, "b": {"kl": np.array([4.0, 5.0, 6.0])}}
    found = scores_report(scores, resamples=10)
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"accuracy": 0.5, "kl": 3.5, "a: accuracy": 0.5, "a: kl": 2, "b: kl": 5}
    )


@pytest.mark.shared
@pytest.mark.slow
def test_what_one_model_knows_and_another_does_not():
    """broad-clip knows the forty things, photographs-clip does not; both by the logits of transformers alone."""
    folder = Path(os.environ.get("CLIP_PO_SHARED", Path(__file__).parents[3] / "shared"))
    if not folder.exists():
        pytest.skip(f"no folder {folder}")
    rows = load_retention_sets([f"{folder}/data/forty_things:train[:300]"], ["a photo of a {}"])["forty_things"]
    names, label = rows.dataset.features["label"].names, np.array(rows.dataset["label"])
    processor = CLIPProcessor.from_pretrained(folder / "models" / "broad-clip")
    texts = open_vocabulary("a photo of a {}")
    models, expected = {}, {}
    for name in ("broad-clip", "photographs-clip"):
        models[name] = CLIPModel.from_pretrained(folder / "models" / name)
        prompts = [*(f"a photo of a {word}" for word in names), *texts]
        inputs = processor(text=prompts, images=list(rows.dataset["image"]), return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = models[name](**inputs).logits_per_image.double()
        right = (logits[:, : len(names)].argmax(dim=1).numpy() == label).mean()
        expected[name] = right, logits[:, len(names) :].log_softmax(dim=1)
    results = measure_set(models, processor, rows.dataset, rows.labelled, texts, disable_tqdm=True)
    scores = set_scores(label, results["photographs-clip"], results["broad-clip"])
    found = scores_report({"forty_things": scores}, resamples=200)
    (was, before), (now, after) = expected.values()
    assert was > 0.4
    assert found["accuracy"].value == pytest.approx(now)
    assert found["retention_cost"].value == pytest.approx(100 * (was - now))
    kl = (before.exp() * (before - after)).sum(dim=1).mean().item()
    assert found["kl"].value == pytest.approx(kl, rel=1e-4)
    assert found["kl"].low > 1
