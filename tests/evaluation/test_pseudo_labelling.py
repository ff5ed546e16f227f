"""Labels and weights from the model's own answers on clean images."""

import datasets
import pytest
import torch
from samples import CLASSES

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images
from clip_po.evaluation.pseudo_labelling import pseudo_labels
from clip_po.evaluation.zero_shot import class_embeddings, zero_shot_accuracy
from clip_po.policy import candidate_logps

TEMPLATES = ["a photo of a {}"]


@pytest.fixture
def unlabelled(labelled):
    return labelled.remove_columns("label")


def test_labels_are_the_models_answers_and_weights_how_sure_it_is(model, processor, labelled, unlabelled):
    found = pseudo_labels(model, processor, unlabelled, CLASSES, TEMPLATES, batch_size=5, disable_tqdm=True)
    answers = zero_shot_accuracy(model, processor, labelled, TEMPLATES, disable_tqdm=True).predicted
    assert found["label"] == answers.tolist()
    pixels = processor(images=list(labelled["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        texts = class_embeddings(model, processor, CLASSES, TEMPLATES)
        logps = candidate_logps(encode_images(model, pixels), texts, model.logit_scale.exp())
    probability = logps.exp().amax(dim=1)
    torch.testing.assert_close(torch.tensor(found["weight"]), probability / probability.mean(), rtol=1e-4, atol=1e-5)
    assert sum(found["weight"]) == pytest.approx(len(found))


def test_given_labels_are_not_read(model, processor, labelled, unlabelled):
    wrong = labelled.map(lambda row: {"label": 0}).add_column("weight", [7.0] * 16)
    with_labels, without = (
        pseudo_labels(model, processor, rows, CLASSES, TEMPLATES, disable_tqdm=True) for rows in (wrong, unlabelled)
    )
    assert with_labels["label"] == without["label"]
    assert with_labels["weight"] == without["weight"]


def test_the_rows_make_preferences(model, processor, unlabelled):
    rows = pseudo_labels(model, processor, unlabelled, CLASSES, TEMPLATES, disable_tqdm=True)
    attack = TypographicAttack(words=CLASSES, min_side=32)
    row = TypographicPreferences(rows, attack, weight_column="weight")[3]
    assert row["chosen"] == f"a photo of a {CLASSES[rows[3]['label']]}"
    assert row["weight"] == rows[3]["weight"]


def test_an_unreadable_image_is_named_by_its_row(model, processor):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"junk", "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    with pytest.raises(ValueError, match="Row 0"):
        pseudo_labels(model, processor, rows, CLASSES, TEMPLATES, disable_tqdm=True)
