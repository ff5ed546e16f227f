"""Preferences between images: pi(x | t), its losses and its regularization, against computations row by row."""

import datasets
import pytest
import torch
from samples import (
    PROMPTS,
    StopAt,
    logged,
    make_captioned,
    make_image_pairs,
    make_labelled,
    make_preferences,
    picture,
    weights,
)
from tolerances import LOGPS, RUNS
from torch import distributed
from torch.nn import functional as F

from clip_po import candidates
from clip_po.candidate_images import OwnCandidates, images_of_all
from clip_po.candidates import in_batch_candidates
from clip_po.losses import sigmoid_loss

RUN = {
    "candidate_texts": None,
    "reg_weight": 0.0,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "max_steps": 4,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}


@torch.no_grad()
def logits(model, processor, images, texts):
    """Scaled cosines [images, texts], by the processor and the towers alone."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    return model.logit_scale.exp() * image @ text.T


def batch_of(trainer, indices):
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


def policy_logps(trainer, batch):
    with torch.no_grad():
        return trainer.policy(trainer.model, trainer.encoder, batch).preference


@pytest.mark.numeric
def test_the_policy_is_the_softmax_over_the_images_of_the_row(make_trainer, processor):
    rows = make_image_pairs(5, rejected=3)
    trainer = make_trainer(rows)
    found = policy_logps(trainer, batch_of(trainer, range(5)))
    for index, row in enumerate(rows):
        images = [row["chosen_image"], *row["rejected_image"]]
        expected = logits(trainer.model, processor, images, [row["text"]]).log_softmax(dim=0)[:, 0]
        torch.testing.assert_close(found[index, : len(images)], expected, rtol=0, atol=LOGPS)
        assert found[index, len(images) :].isneginf().all()


@pytest.mark.numeric
def test_all_images_of_the_batch_are_candidates_if_asked_for_and_each_once(make_trainer, processor, model):
    pairs = make_image_pairs(4)
    rows = datasets.concatenate_datasets([pairs, pairs.select([1])])
    trainer = make_trainer(rows, in_batch_candidates=True)
    batch = in_batch_candidates(batch_of(trainer, range(5)), trainer.candidates.identity)
    found = policy_logps(trainer, batch)
    images = [row[name] for row in pairs for name in ("chosen_image", "rejected_image")]
    expected = logits(trainer.model, processor, images, PROMPTS).log_softmax(dim=0)  # over 8 images, not 10
    for index in range(5):
        row = index if index < 4 else 1
        torch.testing.assert_close(found[index, batch["chosen"][index]], expected[2 * row, row], rtol=0, atol=LOGPS)
        rejected = found[index, batch["rejected"][index, 0]]
        torch.testing.assert_close(rejected, expected[2 * row + 1, row], rtol=0, atol=LOGPS)
    assert (~found.isneginf()).sum(dim=-1).tolist() == [8] * 5


def test_images_of_padding_and_of_skipped_rows_are_no_candidates(make_trainer):
    trainer = make_trainer(make_image_pairs(5), in_batch_candidates=True)
    rows = [trainer.train_dataset[index] for index in range(4)]
    rows[1]["counted"] = 0.0
    batch = in_batch_candidates(trainer.data_collator(rows), trainer.candidates.identity)
    assert batch["candidate_images"].tolist() == [
        [0, 1, -1, -1, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, -1, -1, 4, 5, 6, 7],
        [0, 1, -1, -1, 4, 5, 6, 7],
    ]
    assert policy_logps(trainer, batch)[1].isfinite().all()


@pytest.mark.numeric
@pytest.mark.parametrize("in_batch", [False, True])
def test_both_directions_are_mixed_in_a_batch(make_trainer, processor, in_batch):
    texts = make_preferences(2).remove_columns("clean_image")
    pairs = make_image_pairs(2, texts=["a red sky", "a blue sky"])
    trainer = make_trainer(datasets.concatenate_datasets([texts, pairs]), in_batch_candidates=in_batch)
    batch = batch_of(trainer, [2, 0, 3, 1])
    all_texts = [PROMPTS[0], PROMPTS[1], PROMPTS[3], "a red sky", "a blue sky"]
    images = [*(row[name] for row in pairs for name in ("chosen_image", "rejected_image")), *texts["image"]]
    values = logits(trainer.model, processor, images, all_texts)
    if in_batch:
        batch = in_batch_candidates(batch, trainer.candidates.identity)
    found = policy_logps(trainer, batch)
    ours = [found[n, batch["chosen"][n]] - found[n, batch["rejected"][n, 0]] for n in range(4)]
    by_hand = [values[0, 3] - values[1, 3], None, values[2, 4] - values[3, 4], None]
    for row, number in ((0, 1), (1, 3)):
        chosen, rejected = (all_texts.index(texts[row][name]) for name in ("chosen", "rejected"))
        by_hand[number] = values[4 + row, chosen] - values[4 + row, rejected]
    torch.testing.assert_close(torch.stack(ours), torch.stack(by_hand), rtol=0, atol=LOGPS)
    if in_batch:
        first = batch["chosen"][1]
        expected = values[4].log_softmax(dim=0)[all_texts.index(texts[0]["chosen"])]
        torch.testing.assert_close(found[1, first], expected, rtol=0, atol=LOGPS)
        expected = values[:, 3].log_softmax(dim=0)[0]
        torch.testing.assert_close(found[0, batch["chosen"][0]], expected, rtol=0, atol=LOGPS)


@pytest.mark.numeric
def test_the_loss_is_dpo_on_the_log_ratios_of_the_images(make_trainer, processor, model):
    rows = make_image_pairs(4).add_column("weight", [1.0, 2.0, 0.0, 0.5])
    trainer = make_trainer(rows, beta=0.5)
    with torch.no_grad():
        for parameter in trainer.model.vision_model.parameters():
            parameter.mul_(1.2)
    found = trainer.compute_loss(trainer.model, batch_of(trainer, range(4)))
    losses = []
    for row in rows:
        images = [row["chosen_image"], row["rejected_image"]]
        ratios = logits(trainer.model, processor, images, [row["text"]]) - logits(
            model, processor, images, [row["text"]]
        )
        losses.append(row["weight"] * sigmoid_loss(ratios[:1, 0], ratios[1:], beta=0.5))
    torch.testing.assert_close(found, torch.cat(losses).sum() / 4, rtol=0, atol=10 * LOGPS)


@pytest.mark.numeric
def test_the_kl_on_images_with_texts_runs_in_both_directions(make_trainer, processor, model):
    captioned = make_captioned(4)
    trainer = make_trainer(make_image_pairs(4), reg_dataset=captioned, reg_weight=1.0)
    with torch.no_grad():
        for parameter in trainer.model.vision_model.parameters():
            parameter.mul_(1.2)
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(rows)
    images, texts = [row["reg_image"] for row in rows], [row["reg_text"] for row in rows]
    assert sorted(texts) == sorted(captioned["text"])
    found = trainer.policy(trainer.model, trainer.encoder, batch).regularization
    known = trainer.reference(batch).regularization
    policy, reference = (logits(m, processor, images, texts) for m in (trainer.model, model))
    for direction in (0, 1):  # over images, over texts
        kl = F.kl_div(
            policy.log_softmax(direction), reference.log_softmax(direction), log_target=True, reduction="none"
        ).sum(direction)
        half = slice(0, 4) if direction else slice(4, 8)
        ours = 2 * (known[:, half].exp() * (known[:, half] - found[:, half])).sum(-1)
        torch.testing.assert_close(ours, kl, rtol=1e-3, atol=10 * LOGPS)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4))


def test_a_regularization_that_would_preserve_nothing_is_refused(make_trainer):
    with pytest.raises(ValueError, match="Add a column 'text' to reg_dataset"):
        make_trainer(make_image_pairs(4), reg_dataset=make_labelled(4), reg_weight=1.0)
    make_trainer(make_image_pairs(4), reg_dataset=make_labelled(4), reg_weight=1.0, reg_type="embedding")
    make_trainer(make_image_pairs(4), reg_dataset=make_labelled(4), reg_weight=1.0, candidate_texts=PROMPTS)


@pytest.mark.numeric
@pytest.mark.parametrize("towers", [{}, {"train_text_model": True, "train_vision_model": False}])
@pytest.mark.parametrize("in_batch", [False, True])
def test_cached_embeddings_train_the_same(make_trainer, tmp_path, towers, in_batch):
    pairs = make_image_pairs(6, rejected=3)
    rows = datasets.concatenate_datasets([pairs, pairs.select([0, 3])])
    settings = {**towers, "in_batch_candidates": in_batch, "loss_type": ["sigmoid", "sft"]}
    runs = []
    for cached in (False, True):
        trainer = make_trainer(
            rows,
            precompute_ref_log_probs=cached,
            embeddings_cache=str(tmp_path / "cache") if cached else None,
            reg_dataset=make_captioned(5),
            reg_weight=0.5,
            **settings,
        )
        trainer.train()
        runs.append(trainer)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for name, value in weights(runs[0].model).items():
        torch.testing.assert_close(weights(runs[1].model)[name], value, rtol=RUNS, atol=LOGPS)


@pytest.mark.numeric
def test_every_batch_size_and_accumulation_trains_the_same(make_trainer):
    """13 rows of two to four images: steps of 8 and of 5 rows, the rest of which is padding that does not count."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            make_image_pairs(13, rejected=3),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append((weights(trainer.model), trainer.state.log_history))
    (first, first_logs), *others = runs
    for other, logs in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=RUNS, atol=LOGPS)
        for one, two in zip(first_logs[:-1], logs[:-1], strict=True):
            for name in ("loss", "logps/chosen", "rewards/margins", "rewards/accuracies"):
                assert two[name] == pytest.approx(one[name], rel=RUNS, abs=LOGPS), name


def test_a_resumed_run_ends_with_the_same_weights(make_trainer):
    rows = datasets.concatenate_datasets([make_image_pairs(7), make_preferences(6).remove_columns("clean_image")])
    settings = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    whole = make_trainer(rows, folder="whole", **settings)
    whole.train()
    make_trainer(rows, folder="parts", callbacks=[StopAt(2)], **settings).train()
    resumed = make_trainer(rows, folder="parts", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=1e-7)


def test_a_run_with_other_images_is_not_resumed(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(make_image_pairs(8), callbacks=[StopAt(2)], **settings).train()
    changed = make_image_pairs(8).map(
        lambda row, index: {"rejected_image": picture(1)} if index == 3 else {}, with_indices=True
    )
    with pytest.raises(ValueError, match="images of its rows"):
        make_trainer(changed, **settings).train(resume_from_checkpoint=True)


def test_training_prefers_the_chosen_images(make_trainer):
    trainer = make_trainer(
        make_image_pairs(8), eval_dataset=make_image_pairs(8), max_steps=30, beta=1.0, optim="adamw_torch",
        learning_rate=1e-3, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] == 1
    assert logged(trainer, "loss")[-1] < 0.5 * logged(trainer, "loss")[0]


def test_images_of_a_single_process_are_left_as_they_are():
    embeds = torch.ones(3, 2)
    assert images_of_all(embeds, {"images_of_processes": [3]}) is embeds
    assert images_of_all(embeds, {}) is embeds


def test_a_batch_without_images_to_choose_from_may_meet_one_with_them(make_trainer, monkeypatch):
    """One process has rows of texts, the other rows of images: both see the same texts and images."""
    rows = datasets.concatenate_datasets([make_preferences(2).remove_columns("clean_image"), make_image_pairs(2)])
    trainer = make_trainer(rows, in_batch_candidates=True)
    halves = [batch_of(trainer, [0, 1]), batch_of(trainer, [2, 3])]
    whole = in_batch_candidates(batch_of(trainer, range(4)))
    shares = [(half["texts"], OwnCandidates.of(half)) for half in halves]
    monkeypatch.setattr(candidates, "gather_objects", lambda own: shares)
    for rank, half in enumerate(halves):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        found = in_batch_candidates(half)
        assert found["images_of_processes"] == [2, 4]
        for name in ("candidates", "candidate_images", "chosen", "rejected"):
            assert found[name].tolist() == whole[name][2 * rank : 2 * rank + 2].tolist(), name
