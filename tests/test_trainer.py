"""The trainer: its loss is the equation, its means are over rows, its runs repeat and resume bit for bit."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from samples import (
    CLASSES,
    PROMPTS,
    StopAt,
    logged,
    make_labelled,
    make_preferences,
    same,
    tiny_config,
    typographic,
    weights,
)
from tolerances import LOGPS, RUNS, largest, rounding
from transformers import CLIPModel, CLIPProcessor

from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images, encode_texts
from clip_po.losses import LABEL_FREE, LOSSES, UNPAIRED, kl_regularization
from clip_po.policy import candidate_logps
from clip_po.trainer import ContrastivePOTrainer

VISION_LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*vision_model.*\.(q_proj|v_proj)"}
RUN = {"learning_rate": 1e-3, "max_steps": 6, "logging_steps": 1}
METRICS = {
    "loss",
    "kl",
    "loss/preference",
    "loss/regularization",
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/margins",
    "rewards/rejected",
}


def _counting(embed, seen):
    def counted(pixels):
        seen.append(len(pixels))
        return embed(pixels)

    return counted


def plain_loss(model, processor, rows, beta, reg_weight):
    """DPO and the KL written out from the paper, row by row, without any of the package."""
    reference = CLIPModel.from_pretrained(model.config.name_or_path)
    total = 0.0

    def logps(encoder, image):
        inputs = processor(text=PROMPTS, images=[image], return_tensors="pt", padding=True)
        return encoder(**inputs).logits_per_image.log_softmax(-1)[0]

    for row in rows:
        chosen, rejected = PROMPTS.index(row["chosen"]), PROMPTS.index(row["rejected"])
        policy, ref = logps(model, row["image"]), logps(reference, row["image"])
        margin = (policy[chosen] - ref[chosen]) - (policy[rejected] - ref[rejected])
        total += -torch.nn.functional.logsigmoid(beta * margin)
        policy, ref = logps(model, row["clean_image"]), logps(reference, row["clean_image"])
        total += reg_weight * (ref.exp() * (ref - policy)).sum()
    return total / len(rows)


def perturbed(clip_folder):
    """A policy that has left its reference, so that no term of the loss is 0."""
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.numeric
def test_loss_and_gradients_equal_the_equation_written_out(make_trainer, clip_folder, processor):
    rows = make_preferences(5)
    model = perturbed(clip_folder)
    trainer = make_trainer(
        rows, model=model, ref_model=CLIPModel.from_pretrained(clip_folder), beta=0.7, reg_weight=0.3
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    expected = plain_loss(model, processor, [rows[i] for i in range(5)], beta=0.7, reg_weight=0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=LOGPS)
    assert {name.split(".")[0] for name in gradients} == {"vision_model", "visual_projection"}
    error = rounding(scale=largest(gradients.values()))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=RUNS, atol=error)


@pytest.mark.numeric
def test_metrics_carry_dpotrainers_names_and_are_means_over_rows(make_trainer):
    trainer = make_trainer(make_preferences(13), eval_dataset=make_preferences(13), num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert set(trainer.state.log_history[0]) >= METRICS
    result = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= set(result)
    one_by_one = []
    for i in range(13):
        batch = trainer.data_collator([trainer.eval_dataset[i]])
        one_by_one.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    assert result["eval_loss"] == pytest.approx(sum(one_by_one) / 13, abs=LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_does_not_depend_on_the_batch_size(make_trainer, clip_folder, batch_size):
    results = []
    for size in (13, batch_size):
        trainer = make_trainer(
            make_preferences(4),
            model=perturbed(clip_folder),
            ref_model=CLIPModel.from_pretrained(clip_folder),
            eval_dataset=make_preferences(13),
            per_device_eval_batch_size=size,
        )
        results.append(trainer.evaluate())
    for name in METRICS:
        assert results[0][f"eval_{name}"] == pytest.approx(results[1][f"eval_{name}"], abs=LOGPS)


@pytest.mark.numeric
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["sft"], ["sigmoid", "sft"]])
def test_accumulated_steps_equal_one_large_step_also_where_the_last_batch_is_ragged(make_trainer, loss_type):
    """13 rows: 8 and 5 at once, or in micro-batches of 4, 4 and 4, 1."""
    runs = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            make_preferences(13),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            optim="sgd",  # Adam turns the rounding of a gradient that is 0 (CLIP's key biases) into steps
            learning_rate=1e-2,
            loss_type=loss_type,
        )
        trainer.train()
        runs.append((weights(trainer.model), logged(trainer, "loss"), logged(trainer, "rewards/margins")))
    for other, losses, margins in runs[1:]:
        assert losses == pytest.approx(runs[0][1], abs=LOGPS)
        assert margins == pytest.approx(runs[0][2], abs=LOGPS)
        for name, value in runs[0][0].items():
            torch.testing.assert_close(value, other[name], rtol=RUNS, atol=LOGPS)


@pytest.mark.numeric
def test_row_weights_count(make_trainer):
    rows = make_preferences(6)
    doubled = rows.add_column("weight", [2.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    kept = make_preferences(6).select([0, 0, 3, 4])
    results = [
        make_trainer(make_preferences(4), eval_dataset=data, reg_weight=0.0, beta=3.0).evaluate()
        for data in (doubled, kept)
    ]
    assert results[0]["eval_logps/chosen"] == pytest.approx(results[1]["eval_logps/chosen"], abs=LOGPS)


@pytest.mark.slow
def test_fifty_steps_repeat_and_resume_bit_for_bit_with_fresh_attacks_and_two_workers(make_trainer, tmp_path):
    settings = {
        "max_steps": 50,
        "dataloader_num_workers": 2,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 20,
        "lr_scheduler_type": "cosine",
        "logging_steps": 7,
    }
    first, second = (make_trainer(typographic(), folder=folder, **settings) for folder in ("first", "second"))
    first.train()
    second.train()
    assert same(weights(first.model), weights(second.model))

    stopped = make_trainer(typographic(), **settings, callbacks=[StopAt(20)], output_dir=str(tmp_path / "stopped"))
    stopped.train()
    assert stopped.state.global_step == 20
    resumed = make_trainer(typographic(), **settings, output_dir=str(tmp_path / "stopped"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 50
    assert same(weights(first.model), weights(resumed.model))


def test_a_run_logs_its_own_rows_alone(make_trainer):
    fresh, used = (make_trainer(make_preferences(13), max_steps=2) for _ in range(2))
    used.training_means.add({"kl": (torch.tensor([9.0]), torch.tensor([1.0]))})  # of a run that ended between two logs
    fresh.train()
    used.train()
    assert logged(used, "kl") == logged(fresh, "kl")


def test_another_seed_gives_other_weights(make_trainer):
    runs = [make_trainer(make_preferences(13), seed=seed) for seed in (1, 2)]
    for run in runs:
        run.train()
    assert not same(*(weights(run.model) for run in runs))


def test_only_the_vision_side_trains_by_default(make_trainer):
    trainer = make_trainer(make_preferences(8))
    before = weights(trainer.model)
    trainer.train()
    changed = {n.split(".")[0] for n, v in weights(trainer.model).items() if not torch.equal(v, before[n])}
    assert changed == {"vision_model", "visual_projection"}


def test_text_tower_and_logit_scale_train_on_demand(make_trainer):
    trainer = make_trainer(make_preferences(8), train_text_model=True, train_logit_scale=True)
    before = weights(trainer.model)
    trainer.train()
    changed = {n.split(".")[0] for n, v in weights(trainer.model).items() if not torch.equal(v, before[n])}
    assert changed == {"vision_model", "visual_projection", "text_model", "text_projection", "logit_scale"}


@pytest.mark.numeric
def test_the_reference_stays_where_training_started(make_trainer, model, processor):
    trainer = make_trainer(make_preferences(8), train_text_model=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    before = trainer.reference(batch).preference
    trainer.train()
    torch.testing.assert_close(trainer.reference(batch).preference, before, rtol=0, atol=0)


@pytest.mark.numeric
def test_new_adapters_are_compared_with_the_base(make_trainer, model):
    trainer = make_trainer(make_preferences(8), peft_config=LoraConfig(**VISION_LORA), max_steps=4)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    plain = make_trainer(make_preferences(8), model=model)
    torch.testing.assert_close(trainer.reference(batch).preference, plain.reference(batch).preference, rtol=0, atol=0)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=LOGPS)


@pytest.mark.numeric
def test_trained_adapters_are_their_own_reference_and_are_saved_without_it(make_trainer, model, clip_folder, tmp_path):
    adapted = get_peft_model(model, LoraConfig(**VISION_LORA, init_lora_weights=False))
    trainer = make_trainer(make_preferences(8), model=adapted, max_steps=4)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    start = trainer.policy(trainer.model, trainer.encoder, batch).preference.detach()
    torch.testing.assert_close(trainer.reference(batch).preference, start, rtol=0, atol=LOGPS)
    trainer.train()
    torch.testing.assert_close(trainer.reference(batch).preference, start, rtol=0, atol=LOGPS)
    trainer.save_model(str(tmp_path / "adapter"))
    assert [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()] == []

    again = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), str(tmp_path / "adapter"))
    merged = again.merge_and_unload()
    assert isinstance(merged, CLIPModel)
    with torch.no_grad():
        ours = trainer.encoder.eval().get_image_features(batch["pixel_values"]).pooler_output
        theirs = merged.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("redraw", ["never", "every_epoch"])
def test_a_reference_seen_once_gives_the_same_run_as_one_seen_each_step(make_trainer, redraw):
    runs = []
    for precompute in (None, False):
        trainer = make_trainer(typographic(redraw=redraw), precompute_ref_log_probs=precompute, max_steps=8)
        trainer.train()
        runs.append(logged(trainer, "loss"))
        known = set(trainer.train_dataset.reference)
        expected = {"image", "reg_image"} if redraw == "never" else {"reg_image"}
        assert known == (expected if precompute is None else set())
    assert runs[0] == pytest.approx(runs[1], abs=LOGPS)


def test_regularization_images_may_come_from_another_data_set(make_trainer):
    rows = make_preferences(8).remove_columns("clean_image")
    trainer = make_trainer(rows, reg_dataset=make_labelled(5), max_steps=4)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "kl"))
    assert set(trainer.train_dataset.reference) == {"image", "reg_image"}


def test_rows_may_name_their_own_candidates(make_trainer):
    rows = make_preferences(13)
    settings = {"candidate_texts": None, "max_steps": 20, "learning_rate": 3e-3, "loss_type": ["sigmoid", "sft"]}
    trainer = make_trainer(rows, eval_dataset=rows, **settings)
    before = trainer.evaluate()["eval_logps/chosen"]
    trainer.train()
    assert trainer.evaluate()["eval_logps/chosen"] > before


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - LABEL_FREE - UNPAIRED))
def test_every_loss_learns_the_preferences(make_trainer, loss_type):
    rows = make_preferences(13)
    settings = {"max_steps": 40, "learning_rate": 3e-3, "reg_weight": 0.01, "beta": 0.5}
    settings |= {"label_smoothing": 0.01} if loss_type == "exo_pair" else {}
    trainer = make_trainer(rows, eval_dataset=rows, loss_type=loss_type, **settings)
    trainer.train()
    found = trainer.evaluate()
    if loss_type == "sft":  # knows no reference, hence no rewards
        assert found["eval_logps/chosen"] > found["eval_logps/rejected"] + 1
        assert not any(name.startswith("eval_rewards/") for name in found)
    elif loss_type in ("apo_down", "discopop"):  # one lowers both texts, the other is not convex
        assert found["eval_rewards/margins"] > 0.2
    else:
        assert found["eval_rewards/accuracies"] > 0.9


def test_rewards_of_simpo_are_those_without_a_reference(make_trainer):
    rows = make_preferences(5)
    trainer = make_trainer(rows, eval_dataset=rows, loss_type="simpo", beta=2.0)
    found = trainer.evaluate()
    assert found["eval_rewards/chosen"] == pytest.approx(2.0 * found["eval_logps/chosen"], rel=1e-5)
    assert found["eval_rewards/margins"] == pytest.approx(
        2.0 * (found["eval_logps/chosen"] - found["eval_logps/rejected"]), rel=1e-4
    )


@pytest.mark.parametrize("apart", [False, True])
def test_distillation_teaches_the_answers_on_clean_images_without_any_text(make_trainer, apart):
    rows = make_preferences(13)
    ordinary = rows.select_columns("image") if apart else None
    settings = {"max_steps": 30, "learning_rate": 3e-3, "reg_weight": 0.1, "loss_type": "distillation"}
    trainer = make_trainer(rows, eval_dataset=rows, reg_dataset=ordinary, **settings)
    before = trainer.evaluate()["eval_loss/preference"]
    with torch.no_grad():
        target, said = (
            candidate_logps(
                encode_images(trainer.model, to_pixels(trainer.processing_class, list(rows[column]))),
                encode_texts(trainer.model, trainer.processing_class, PROMPTS),
                trainer.model.logit_scale.exp(),
            )
            for column in ("clean_image", "image")
        )
    assert before == pytest.approx(kl_regularization(target, said).mean().item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss/preference"] < 0.6 * before


def test_the_reference_never_sees_preferences_where_no_loss_compares_them(make_trainer):
    asked = {}
    for loss_type in ("sigmoid", "distillation"):
        trainer = make_trainer(make_preferences(8), loss_type=loss_type, max_steps=2, num_train_epochs=1)
        seen = asked.setdefault(loss_type, [])
        embed = trainer.reference.image_embeds
        trainer.reference.image_embeds = _counting(embed, seen)
        trainer.train()
    assert sum(asked["sigmoid"]) == 2 * sum(asked["distillation"]) > 0


@pytest.mark.parametrize("settings", [{"bf16": True}, {"torch_compile": False, "max_grad_norm": 0.5}])
def test_trainers_own_settings_work(make_trainer, settings):
    trainer = make_trainer(make_preferences(8), eval_dataset=make_preferences(5), **settings)
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


def test_several_evaluation_sets_and_the_best_checkpoint(make_trainer):
    trainer = make_trainer(
        make_preferences(8),
        eval_dataset={"near": make_preferences(5), "far": make_preferences(7)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_far_loss",
        save_total_limit=1,
    )
    trainer.train()
    assert len(logged(trainer, "eval_near_loss")) == len(logged(trainer, "eval_far_loss")) == 3
    assert trainer.state.best_metric == min(logged(trainer, "eval_far_loss"))


def test_compute_metrics_sees_batches_and_needs_batch_eval_metrics(make_trainer):
    seen = []

    def accuracy(prediction, compute_result):
        seen.append((prediction.predictions.argmax(-1) == prediction.label_ids).float())
        return {"accuracy": torch.cat(seen).mean().item()} if compute_result else {}

    trainer = make_trainer(
        make_preferences(8),
        eval_dataset=make_preferences(13),
        compute_metrics=accuracy,
        batch_eval_metrics=True,
        per_device_eval_batch_size=4,
    )
    result = trainer.evaluate()
    assert sum(len(batch) for batch in seen) == 13
    assert 0 <= result["eval_accuracy"] <= 1
    with pytest.raises(ValueError, match="batch_eval_metrics=True"):
        make_trainer(make_preferences(8), compute_metrics=accuracy)


def test_a_saved_model_is_a_plain_clip_with_its_processor_and_no_pickle(make_trainer, processor, tmp_path):
    trainer = make_trainer(
        make_preferences(8), hub_token="hf_secret_token_of_mine", save_strategy="steps", save_steps=3
    )
    trainer.train()
    out = tmp_path / "out"
    trainer.save_model(str(out))
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "training_args.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    loaded = CLIPModel.from_pretrained(out)
    assert same(dict(loaded.state_dict()), weights(trainer.model))
    image = make_preferences(1)[0]["image"]
    ours, theirs = (
        p(images=image, return_tensors="pt")["pixel_values"] for p in (processor, CLIPProcessor.from_pretrained(out))
    )
    assert torch.equal(ours, theirs)
    assert json.loads((out / "training_args.json").read_text())["hub_token"] == "<redacted>"
    written = [path for path in Path(trainer.args.output_dir).parent.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"hf_secret_token_of_mine" in path.read_bytes()]


def test_adamax_is_the_presets_optimizer_and_an_optimizer_of_the_users_wins(make_trainer, clip_folder, tmp_path):
    args = ContrastivePOConfig.from_preset("ipo", output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = ContrastivePOTrainer(
        str(clip_folder), args=args, train_dataset=make_preferences(4), candidate_texts=PROMPTS
    )
    assert type(trainer.create_optimizer()) is torch.optim.Adamax
    model = CLIPModel.from_pretrained(clip_folder)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ContrastivePOTrainer(
        model, args=args, train_dataset=make_preferences(4), candidate_texts=PROMPTS, optimizers=(own, None)
    )
    assert trainer.create_optimizer() is own


def test_weight_decay_leaves_scales_and_embeddings_alone(make_trainer):
    trainer = make_trainer(make_preferences(4))
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert decayed
    assert not [n for n in decayed if "logit_scale" in n or "class_embedding" in n or "position_embedding" in n]


def test_an_unreadable_image_is_named_by_its_row(make_trainer, tmp_path):
    rows = make_preferences(5)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [
        None if i == 3 else row
        for i, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))["image"])
    ]
    paths[3] = {"path": str(tmp_path / "broken.png"), "bytes": None}
    broken = rows.remove_columns("image").add_column("image", paths, feature=datasets.Image())
    trainer = make_trainer(broken, precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match=r"row 3: the image in column .*image"):
        trainer.train()


def test_evaluation_draws_the_attack_of_epoch_0_always(make_trainer):
    settings = {"precompute_ref_log_probs": True, "max_steps": 3}
    trainer = make_trainer(typographic(redraw="never"), eval_dataset=typographic(5), **settings)
    first = trainer.evaluate()
    assert set(trainer.eval_dataset.reference) == {"image", "reg_image"}
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]


def test_a_data_set_smaller_than_a_batch_is_not_filled_up(make_trainer):
    trainer = make_trainer(make_preferences(5), per_device_train_batch_size=512)
    assert [len(batch["weight"]) for batch in trainer.get_train_dataloader()] == [5]


def test_images_under_a_transform_are_not_taken_for_fixed(make_trainer):
    rows = make_preferences(8).with_transform(lambda batch: batch)
    trainer = make_trainer(rows, max_steps=5)
    trainer.train()
    assert trainer.train_dataset.reference == {}


def test_what_trackers_get_holds_no_token(tmp_path):
    args = ContrastivePOConfig(str(tmp_path), model_init_kwargs={"token": "hf_mine"}, hub_token="hf_mine")
    assert "hf_mine" not in args.to_json_string() + repr(args.to_dict())
    assert args.hub_token == "hf_mine"


def test_a_reference_of_another_size_is_refused(make_trainer):
    other = CLIPModel(tiny_config(vision={"image_size": 64}))
    with pytest.raises(ValueError, match="reads 64"):
        make_trainer(make_preferences(4), ref_model=other)


@pytest.mark.parametrize("loss_type", ["ipo", "kto_pair"])
def test_several_rejected_texts_are_refused_at_the_start_where_a_loss_takes_one(make_trainer, loss_type):
    labelled = make_labelled(8)
    attack = TypographicAttack(words=CLASSES, min_side=32)
    several = TypographicPreferences(labelled, attack, rejected="others")
    with pytest.raises(ValueError, match="rejected='word'"):
        make_trainer(several, loss_type=loss_type)
    assert make_trainer(several).train_dataset[0]["rejected"][1:] != []


def test_several_evaluation_sets_at_once_are_refused_by_a_data_loader(make_trainer):
    several = {"one": make_preferences(4), "two": make_preferences(4)}
    trainer = make_trainer(make_preferences(4), eval_dataset=several)
    for load in (trainer.get_eval_dataloader, lambda: trainer.predict(several)):
        with pytest.raises(TypeError, match=r"eval_dataset must be a datasets\.Dataset"):
            load()
