"""Counterfactual targets: who is a counterpart, and what the rows train."""

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from samples import PROMPTS, make_labelled, tiny_config
from transformers import CLIPModel

from clip_po.data.counterfactual import counterfactual_rows, counterparts


def test_a_counterpart_is_of_another_group_and_alike():
    groups = np.array(["man", "woman", "woman"] * 40)
    alike = np.array([f"{number % 4}" for number in range(120)])
    found = counterparts(groups, alike)
    assert (groups[found] != groups).all()
    assert (alike[found] == alike).all()
    # Each of the possible counterparts is drawn: 10 women for 10 men of a kind would be missed rarely.
    assert len(set(found[groups == "woman"])) > 30
    assert not np.array_equal(found, counterparts(groups, alike, seed=1))
    assert np.array_equal(found, counterparts(groups, alike))


def test_an_image_without_a_counterpart_is_left_out():
    found = counterparts([0, 1, 0, 0], ["a", "a", "b", "b"])
    assert found.tolist()[1:] == [0, -1, -1]
    rows = counterfactual_rows(make_labelled(4), found, PROMPTS)
    assert len(rows) == 2


def test_rows_pair_an_image_with_its_target():
    images = make_labelled(3)
    rows = counterfactual_rows(images, [2, 1, 0], PROMPTS, weight=0.5)
    for row, target in zip(rows, (2, 1, 0), strict=True):
        assert np.array_equal(row["clean_image"], images[target]["image"])
    assert [np.array(row["image"]).tolist() for row in rows] == [np.array(row["image"]).tolist() for row in images]
    assert rows["candidates"][:] == [PROMPTS] * 3
    assert rows["weight"][:] == [0.5] * 3


def test_the_loss_is_the_kl_to_the_references_answer_on_the_counterpart(make_trainer, model):
    torch.manual_seed(1)
    other_model = CLIPModel(tiny_config())
    images, targets = make_labelled(4), [1, 0, 3, 2]
    trainer = make_trainer(
        model=model,
        ref_model=other_model,
        train_dataset=counterfactual_rows(images, targets, PROMPTS),
        loss_type=["distillation"],
        reg_weight=0.0,
        per_device_train_batch_size=4,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    got = trainer.compute_loss(trainer.model, batch)

    def logps(clip, order):
        pixels = [images[number]["image"] for number in order]
        inputs = trainer.processing_class(text=PROMPTS, images=pixels, return_tensors="pt", padding=True)
        with torch.no_grad():
            return clip.eval()(**inputs).logits_per_image.double().log_softmax(dim=1)

    ref, policy = logps(other_model, targets), logps(model, range(4))
    assert got.item() == pytest.approx((ref.exp() * (ref - policy)).sum(dim=1).mean().item(), abs=1e-5)


def test_kinds_of_rows_can_be_joined():
    images = make_labelled(3)
    joined = concatenate_datasets(
        [counterfactual_rows(images, [1, 0, -1], PROMPTS), counterfactual_rows(images, range(3), PROMPTS[:2], 2)]
    )
    assert joined["weight"][:] == [1.0, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counterparts([0, 1], ["a"]), "alike must have an entry for each of the 2 images, got 1"),
        (lambda: counterparts([0, 0], ["a", "b"]), "at least two different"),
        (lambda: counterfactual_rows(make_labelled(2), [1], PROMPTS), "2 images, got .* and 1 targets"),
        (lambda: counterfactual_rows(make_labelled(1), [0], ["a", "a"]), "texts"),
        (lambda: counterfactual_rows(make_labelled(1), [0], PROMPTS, -1), "weight"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
