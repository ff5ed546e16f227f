"""Targets and regularization that belong to no task: embeddings of the reference, and an open vocabulary."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from samples import IMAGE_SIZE, PROMPTS, logged, make_labelled, make_preferences, picture, typographic
from tolerances import LOGPS
from torch.nn import functional as F

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.attacks.words import EVERYDAY_WORDS
from clip_po.data.generic_images import GenericImages
from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.losses import LossSettings, PreferenceLogps, embedding_distillation_loss, preference_loss

RUN = {"learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}


def embeddings(trainer, model, rows, column):
    """Unit-norm embeddings of the images of a column, by the calls of transformers alone."""
    pixels = to_pixels(trainer.processing_class, [row[column] for row in rows])
    with torch.no_grad():
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def open_logps(trainer, model, images, texts):
    tokens = trainer.processing_class.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        named = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return (model.logit_scale.exp() * images @ named.T).log_softmax(-1)


def test_the_loss_is_half_the_squared_distance_of_unit_vectors():
    target, own = F.normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(embedding_distillation_loss(target, own), (target - own).pow(2).sum(-1) / 2)


def test_no_gradient_flows_into_the_target():
    target, own = torch.eye(3, requires_grad=True), torch.eye(3).roll(1, 0).requires_grad_()
    embedding_distillation_loss(target, own).sum().backward()
    assert target.grad is None
    assert own.grad is not None


def test_a_row_without_a_label_counts_in_losses_without_labels_alone():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    found = PreferenceLogps(
        logps,
        logps.unsqueeze(-1) - 1,
        torch.zeros(2),
        torch.zeros(2, 1),
        embeds=torch.eye(2),
        target_embeds=torch.eye(2).flip(0),
        labelled=torch.tensor([True, False]),
    )
    losses = preference_loss(found, ["sft", "embedding_distillation"], [1.0, 10.0], LossSettings())
    assert losses.tolist() == [11.0, 10.0]
    losses.sum().backward()
    assert logps.grad.tolist() == [-1.0, 0.0]


@pytest.mark.numeric
@pytest.mark.parametrize("reg_type", ["kl", "kl_open", "embedding"])
def test_loss_and_regularization_equal_an_independent_computation(make_trainer, reg_type):
    trainer = make_trainer(
        make_preferences(4),
        loss_type=["sft", "embedding_distillation"],
        loss_weights=[1.0, 10.0],
        reg_type=reg_type,
        reg_weight=3.0,
    )
    trainer.train()
    rows = [trainer.train_dataset[number] for number in range(4)]
    model, reference = trainer.model.eval(), trainer.reference.model
    clean, attacked = (embeddings(trainer, model, rows, name) for name in ("clean_image", "image"))
    target = embeddings(trainer, reference, rows, "clean_image")
    logps = open_logps(trainer, model, attacked, PROMPTS)
    chosen = logps[range(4), [PROMPTS.index(row["chosen"]) for row in rows]]
    if reg_type == "embedding":
        regularization = 1 - (clean * target).sum(-1)
    else:
        texts = PROMPTS
        if reg_type == "kl_open":
            texts = [*(f"a photo of a {word}" for word in EVERYDAY_WORDS), *PROMPTS]
        ours, theirs = (open_logps(trainer, m, e, texts) for m, e in ((model, clean), (reference, target)))
        regularization = (theirs.exp() * (theirs - ours)).sum(-1)
    expected = (-chosen + 10 * (1 - (attacked * target).sum(-1)) + 3 * regularization).mean()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert regularization.mean() > 1e-4  # it moved, so that the comparison means something
    assert found.item() == pytest.approx(expected.item(), abs=20 * LOGPS)


def test_the_kl_over_the_candidates_is_logged_for_every_regularization(make_trainer):
    for reg_type in ("kl_open", "embedding"):
        trainer = make_trainer(reg_type=reg_type, folder=reg_type)
        trainer.train()
        assert logged(trainer, "kl")[-1] > 0
        parts = (logged(trainer, f"loss/{name}")[-1] for name in ("preference", "regularization"))
        assert logged(trainer, "loss")[-1] == pytest.approx(sum(parts))


def test_own_texts_of_the_open_vocabulary(make_trainer):
    texts = ["a cat", "a dog", "fog"]
    trainer = make_trainer(reg_type="kl_open", reg_candidate_texts=texts)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert trainer.reference(batch).open_regularization.shape == (1, 3)


WRONG = {
    "unknown": ({"reg_type": "cosine"}, "reg_type must be one of"),
    "texts-without-open": ({"reg_candidate_texts": ["a", "b"]}, "Set reg_type='kl_open'"),
    "one-text": (
        {"reg_type": "kl_open", "reg_candidate_texts": ["a"]},
        "reg_candidate_texts must be a list of at least",
    ),
    "text-tower": ({"reg_type": "embedding", "train_text_model": True}, "train_text_model=True"),
    "open-text-tower": ({"reg_type": "kl_open", "train_text_model": True}, "train_text_model=True"),
    "frozen-vision": (
        {"loss_type": "embedding_distillation", "train_vision_model": False, "train_logit_scale": True},
        "train_vision_model=False",
    ),
    "share-without-loss": ({"reg_share": 0.5}, "Add one of ['distillation', 'embedding_distillation']"),
    "share-of-all": ({"reg_share": 1.0, "loss_type": "distillation"}, "reg_share must lie in [0, 1)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused_at_once(tmp_path, name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        ContrastivePOConfig(str(tmp_path), **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments", [{"reg_type": "embedding"}, {"loss_type": "embedding_distillation"}])
def test_a_transformation_refuses_targets_that_it_moves_itself(make_trainer, arguments):
    with pytest.raises(ValueError, match="compares image embeddings before and after"):
        make_trainer(concept=ConceptTransform(16), **arguments)


# ---- Generic images ---------------------------------------------------------------------------------------


def generic(rows=5):
    """Images of other sizes, without labels."""
    return (
        make_labelled(rows)
        .map(lambda row, n: {"image": picture(500 + n, 40 + n)}, with_indices=True)
        .remove_columns("label")
    )


MIXED = {"reg_share": 0.25, "loss_type": ["sft", "embedding_distillation"], "reg_type": "embedding"}


def test_generic_images_are_the_stated_share_of_the_rows(make_trainer):
    trainer = make_trainer(typographic(12), reg_dataset=generic(), **MIXED)
    rows = [trainer.train_dataset[number] for number in range(16)]
    assert len(trainer.train_dataset) == 16
    assert [row["chosen"] is None for row in rows] == [False] * 12 + [True] * 4
    assert all(row["reg_image"].tobytes() == row["clean_image"].tobytes() for row in rows)
    assert all(row["image"].tobytes() != row["clean_image"].tobytes() for row in rows)


def test_crops_stay_and_words_change_from_epoch_to_epoch(make_trainer):
    trainer = make_trainer(typographic(12), reg_dataset=generic(), **MIXED)
    first, second = (trainer.train_dataset[epoch, epoch * 16 + 13, 13] for epoch in (0, 1))
    assert first["clean_image"].tobytes() == second["clean_image"].tobytes()
    assert first["image"].tobytes() != second["image"].tobytes()


def test_the_loss_of_a_mixed_batch_is_that_of_its_rows(make_trainer):
    trainer = make_trainer(typographic(12), reg_dataset=generic(), learning_rate=0.0, **MIXED)
    rows = [trainer.train_dataset[number] for number in (0, 5, 12, 15)]
    alone = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    together = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    assert together == pytest.approx(sum(alone) / 4, abs=10 * LOGPS)
    embeds = embeddings(trainer, trainer.model.eval(), rows[2:], "image")
    targets = embeddings(trainer, trainer.reference.model, rows[2:], "clean_image")
    assert alone[2:] == pytest.approx((1 - (embeds * targets).sum(-1)).tolist(), abs=10 * LOGPS)


@pytest.mark.parametrize("in_batch", [False, True])
def test_mixed_rows_train_with_candidates_of_their_own(make_trainer, in_batch):
    trainer = make_trainer(
        typographic(12), reg_dataset=generic(), candidate_texts=None, in_batch_candidates=in_batch, **MIXED
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_words_that_are_no_classes_are_candidates_of_their_rows(make_trainer):
    attack = TypographicAttack(words=["moon", "sugar", "tree"], min_side=32)
    trainer = make_trainer(TypographicPreferences(make_labelled(12), attack), candidate_texts=None, **MIXED)
    rows = [trainer.train_dataset[number] for number in range(16)]
    assert all(row["candidates"] == [*PROMPTS, *row["rejected"]] for row in rows)
    batch = trainer.data_collator(rows)
    for row, own, rejected in zip(rows, batch["candidates"], batch["rejected"][:, 0], strict=True):
        assert row["rejected"] == ([batch["texts"][own[rejected]]] if rejected >= 0 else [])
    trainer.train()


def test_metrics_of_preferences_leave_generic_images_out(make_trainer):
    arguments = {**MIXED, "loss_type": ["sigmoid", "embedding_distillation"], "learning_rate": 0.0}
    trainer = make_trainer(typographic(4), reg_dataset=generic(), **{**arguments, "reg_share": 0.5})
    trainer.train()
    plain = make_trainer(typographic(4), folder="plain", **{**arguments, "reg_share": 0.0})
    plain.train()
    for name in ("logps/chosen", "logps/rejected"):
        mean = sum(logged(trainer, name)) / len(logged(trainer, name))
        assert mean == pytest.approx(sum(logged(plain, name)) / len(logged(plain, name)), abs=0.2)


def test_without_a_reg_dataset_generic_images_are_made_of_the_training_images(make_trainer):
    trainer = make_trainer(typographic(12), **MIXED)
    trainer.train()
    rows, own = trainer.train_dataset.preferences.generic, make_labelled(12)["image"]
    crop, collage = (np.asarray(rows.image("clean_image", index)) for index in range(2))
    assert collage.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    height, width, _ = crop.shape
    assert any(
        np.array_equal(crop, np.asarray(image.convert("RGB"))[top : top + height, left : left + width])
        for image in own
        for top in range(IMAGE_SIZE - height + 1)
        for left in range(IMAGE_SIZE - width + 1)
    )


def test_each_generic_image_comes_up_equally_often(monkeypatch):
    """Five rows, three of them collages, show 14 images; the first ten are each of the five twice."""
    read = []
    rows = GenericImages(generic(5), typographic(4).attack, 5, PROMPTS)
    monkeypatch.setattr(rows, "_image", lambda turn: read.append(turn) or picture(turn))
    for index in range(5):
        rows.image("clean_image", index)
    assert read == list(range(14))
    monkeypatch.undo()
    images = [rows._image(turn).tobytes() for turn in range(10)]
    expected = sorted(image.convert("RGB").tobytes() for image in generic(5)["image"])
    assert sorted(images[:5]) == sorted(images[5:]) == expected


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 480)])
def test_images_of_any_size_are_cropped(size):
    images = datasets.Dataset.from_dict({"image": [Image.new("RGB", size, "red")]}).cast_column(
        "image", datasets.Image()
    )
    rows = GenericImages(images, typographic(4).attack, 4, PROMPTS)
    for index in range(4):
        ((_, colour),) = rows.image("clean_image", index).getcolors(maxcolors=2**20)
        assert colour == (255, 0, 0)


def test_rows_without_an_attack_are_refused(make_trainer):
    with pytest.raises(TypeError, match="must be TypographicPreferences, got Dataset"):
        make_trainer(make_preferences(12), reg_dataset=generic(), **MIXED)


def test_evaluation_uses_the_clean_images_of_its_own_rows(make_trainer):
    trainer = make_trainer(typographic(12), eval_dataset=typographic(4), reg_dataset=generic(), **MIXED)
    row = trainer.eval_dataset[1]
    assert row["reg_image"].tobytes() == row["clean_image"].tobytes()
