"""Which parameters train: what the arguments name, without what the user froze. Frozen towers run once."""

import math
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from samples import (
    CHECKPOINTING,
    logged,
    make_image_pairs,
    make_preferences,
    make_unpaired,
    same,
    typographic,
    weights,
)
from tolerances import LOGPS, RUNS
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig

RUN = {"beta": 1.0, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 4}
VISION, TEXT = {"vision_model", "visual_projection"}, {"text_model", "text_projection"}
TEXT_ALONE = {"train_vision_model": False, "train_text_model": True}


def trained(trainer):
    return {name for name, parameter in trainer.encoder.named_parameters() if parameter.requires_grad}


def parts(names):
    return {name.split(".")[0] for name in names}


def changed(trainer):
    """The names of the weights that a run changed."""
    before = weights(trainer.encoder)
    trainer.train()
    return {name for name, value in weights(trainer.encoder).items() if not torch.equal(value, before[name])}


# ---- What the user froze stays frozen


def all_but_the_projection(model):
    model.requires_grad_(False)
    model.visual_projection.requires_grad_(True)


def the_vision_tower(model):
    model.vision_model.requires_grad_(False)
    model.visual_projection.requires_grad_(False)


FREEZES = {
    "all-but-the-projection": (all_but_the_projection, {}, {"visual_projection"}),
    "all-but-the-projection-with-text": (
        all_but_the_projection,
        {"train_text_model": True, "train_logit_scale": True},
        {"visual_projection"},
    ),
    "the-vision-tower": (the_vision_tower, {"train_text_model": True}, TEXT),
    "the-vision-model": (lambda m: m.vision_model.requires_grad_(False), {}, {"visual_projection"}),
    "the-text-projection": (
        lambda m: m.text_projection.requires_grad_(False),
        {"train_text_model": True},
        VISION | {"text_model"},
    ),
    "the-logit-scale": (lambda m: m.logit_scale.requires_grad_(False), {"train_logit_scale": True}, VISION),
    "nothing": (lambda m: None, {"train_logit_scale": True}, VISION | {"logit_scale"}),
}


@pytest.mark.parametrize(("freeze", "arguments", "expected"), FREEZES.values(), ids=FREEZES)
def test_what_the_user_froze_stays_frozen(make_trainer, model, freeze, arguments, expected):
    freeze(model)
    trainer = make_trainer(model=model, **arguments)
    assert parts(trained(trainer)) == expected
    assert parts(changed(trainer)) == expected


def test_single_frozen_layers_stay_frozen(make_trainer, model):
    model.vision_model.embeddings.requires_grad_(False)
    model.vision_model.encoder.layers[0].requires_grad_(False)
    found = changed(make_trainer(model=model))
    assert not [name for name in found if "embeddings" in name or "layers.0" in name]
    assert [name for name in found if "layers.1" in name]


def test_a_tower_that_was_asked_for_but_is_frozen_is_said(make_trainer, model, caplog):
    model.text_model.requires_grad_(False)
    model.text_projection.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    make_trainer(model=model, train_text_model=True, train_logit_scale=True)
    assert "train_text_model=True" in caplog.text
    assert "train_logit_scale=True" in caplog.text
    assert "requires_grad_(True)" in caplog.text


def test_a_tower_that_was_asked_for_but_has_no_adapters_is_said(make_trainer, caplog):
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
    make_trainer(peft_config=lora, train_text_model=True)
    assert "train_text_model=True trains nothing, because no adapter is there" in caplog.text


@pytest.mark.parametrize(
    ("freeze", "arguments"),
    [
        (lambda m: m.requires_grad_(False), {}),
        (lambda m: m.requires_grad_(False), {"train_text_model": True}),
        (the_vision_tower, {}),
        (lambda m: m.vision_model.encoder.layers[1:].requires_grad_(False), {"trainable_layers": 1}),
    ],
    ids=["all", "all-with-text", "the-vision-tower", "the-last-block"],
)
def test_nothing_left_to_train_is_an_error(make_trainer, model, freeze, arguments):
    freeze(model)
    if "trainable_layers" in arguments:
        model.vision_model.post_layernorm.requires_grad_(False)
        model.visual_projection.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing is left to train.*requires_grad_\(True\)"):
        make_trainer(model=model, **arguments)


def test_arguments_that_leave_nothing_to_train_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="train_vision_model=False leaves nothing to train"):
        ContrastivePOConfig(str(tmp_path), train_vision_model=False)
    ContrastivePOConfig(str(tmp_path), train_vision_model=False, train_logit_scale=True)


def test_a_concept_trains_on_a_frozen_model(make_trainer, model):
    trainer = make_trainer(model=model.requires_grad_(False), concept=ConceptTransform(16), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("arguments", [TEXT_ALONE, {"trainable_layers": 1}], ids=["text-alone", "last-layers"])
def test_a_concept_refuses_arguments_about_what_trains(make_trainer, arguments):
    with pytest.raises(ValueError, match="has no effect"):
        make_trainer(concept=ConceptTransform(16), **arguments)


OPTIMIZERS = {
    "frozen": (lambda model: model.text_model.parameters(), False),
    "of-another-object": (lambda model: CLIPModel(model.config).parameters(), False),
    "everything": (lambda model: model.parameters(), True),
    "a-part": (lambda model: model.visual_projection.parameters(), True),
}


@pytest.mark.parametrize(("parameters", "accepted"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_of_nothing_that_trains_is_refused(make_trainer, model, parameters, accepted):
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    expected = nullcontext() if accepted else pytest.raises(ValueError, match="none of the parameters that train")
    with expected:
        assert changed(make_trainer(model=model, optimizers=(optimizer, None)))


# ---- The text tower alone


def test_the_text_tower_trains_alone(make_trainer):
    rows = make_preferences(13)
    trainer = make_trainer(rows, **TEXT_ALONE, eval_dataset=rows, learning_rate=1e-4, max_steps=30)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=LOGPS)
    assert parts(trained(trainer)) == parts(changed(trainer)) == TEXT
    assert trainer.evaluate()["eval_loss"] < math.log(2) - 0.005


def images_seen(trainer):
    """Count the images that the vision towers of policy and reference see in a run."""
    seen = []
    for model in (trainer.encoder, trainer.reference.model):
        model.vision_model.post_layernorm.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    trainer.train()
    return sum(seen)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sft", "distillation"])
def test_with_a_frozen_vision_tower_each_image_is_embedded_once(make_trainer, loss_type):
    trainer = make_trainer(**TEXT_ALONE, loss_type=loss_type, num_train_epochs=3, max_steps=-1)
    steps, stand_in = 12, 1
    assert images_seen(trainer) == 2 * 13 + steps * stand_in
    assert trainer.train_dataset.embedded
    assert "pixel_values" not in trainer.data_collator([trainer.train_dataset[0]])


def test_a_vision_tower_that_the_user_froze_is_run_once_too(make_trainer, model):
    the_vision_tower(model)
    assert images_seen(make_trainer(model=model, train_text_model=True)) == 2 * 13 + 4


def test_a_warm_cache_embeds_no_image(make_trainer, tmp_path):
    steps, stand_in, probe = 4, 1, 1
    arguments = {**TEXT_ALONE, "embeddings_cache": str(tmp_path / "cache")}
    assert images_seen(make_trainer(**arguments)) == 2 * 13 + probe + steps * stand_in
    assert images_seen(make_trainer(**arguments)) == probe + steps * stand_in


ROW_KINDS = {
    "fixed-attack": (lambda: typographic(redraw="never"), {}, 2 * 16),
    "image-pairs": (lambda: make_image_pairs(8, rejected=2), {"candidate_texts": None, "reg_weight": 0.0}, 8 + 12),
    "unpaired": (lambda: make_unpaired(12), {"candidate_texts": None, "loss_type": "kto", "reg_weight": 0.0}, 12),
}


@pytest.mark.parametrize(("rows", "arguments", "images"), ROW_KINDS.values(), ids=ROW_KINDS)
def test_each_image_is_embedded_once_with_rows_of_every_kind(make_trainer, rows, arguments, images):
    """The same losses as with a vision tower that runs in each step, without its passes."""
    run = {**TEXT_ALONE, **arguments, "max_steps": 8}
    once = make_trainer(rows(), **run, folder="once")
    assert images_seen(once) == images + 8  # and the stand-in of each step
    each_step = make_trainer(rows(), **run, precompute_ref_log_probs=False, folder="steps")
    assert images_seen(each_step) > images + 8
    assert logged(once, "loss") == pytest.approx(logged(each_step, "loss"), abs=RUNS)


def test_a_stream_is_embedded_once_a_step(make_trainer):
    trainer = make_trainer(make_preferences(16).to_iterable_dataset(), **TEXT_ALONE)
    assert images_seen(trainer) == 4 * (4 + 4 + 1)  # preferences, clean images and the stand-in


def test_images_that_are_redrawn_are_embedded_once_a_step(make_trainer):
    trainer = make_trainer(typographic(), **TEXT_ALONE)
    rows, steps, stand_in = len(trainer.train_dataset), 4, 1
    assert images_seen(trainer) == rows + 4 * steps + steps * stand_in  # clean images once, drawn ones each step


ALIKE = {
    "fixed": {},
    "not-precomputed": {"precompute_ref_log_probs": False},
    "own-candidates": {"candidate_texts": None},
    "in-batch": {"candidate_texts": None, "in_batch_candidates": True},
    "distillation": {"loss_type": "distillation"},
    "sft-without-regularization": {"loss_type": "sft", "reg_weight": 0.0},
    "logit-scale": {"train_text_model": False, "train_logit_scale": True, "learning_rate": 0.1},
}


@pytest.mark.numeric
@pytest.mark.parametrize("arguments", ALIKE.values(), ids=ALIKE)
def test_embeddings_of_a_frozen_vision_tower_train_as_its_images_do(make_trainer, clip_folder, arguments):
    """With a reference of its own, the policy embeds its images in every step."""
    settings = {**TEXT_ALONE, "optim": "sgd", "learning_rate": 0.02, **arguments}
    runs = []
    for reference in (None, CLIPModel.from_pretrained(clip_folder)):
        trainer = make_trainer(ref_model=reference, eval_dataset=make_preferences(7), **settings)
        start = weights(trainer.encoder)
        trainer.train()
        end = trainer.encoder.state_dict()
        moved = torch.cat([(end[name] - start[name]).flatten() for name in start])
        runs.append((logged(trainer, "loss"), moved, trainer.evaluate()["eval_loss"]))
    (losses, moved, evaluated), (expected_losses, expected, expected_evaluated) = runs
    assert losses == pytest.approx(expected_losses, abs=LOGPS)
    assert evaluated == pytest.approx(expected_evaluated, abs=LOGPS)
    assert ((moved - expected).norm() / expected.norm()).item() < RUNS


def test_adapters_on_the_text_tower_train_alone(make_trainer):
    lora = LoraConfig(r=2, target_modules=r".*text_model.*\.(q_proj|v_proj)")
    trainer = make_trainer(**TEXT_ALONE, peft_config=lora)
    assert images_seen(trainer) == 2 * 13 + 4
    assert {name.split(".")[0] for name in trained(trainer)} == {"text_model"}


def test_adapters_on_a_frozen_vision_tower_are_refused(make_trainer):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"8 trainable adapter parameters are in the vision tower.*text_model"):
        make_trainer(**TEXT_ALONE, peft_config=lora)


def test_unreadable_images_are_skipped_under_a_frozen_vision_tower(make_trainer, tmp_path):
    rows = make_preferences(8)
    images = rows.data.column("image").to_pylist()
    images[3]["bytes"] = b"no picture"
    broken = rows.remove_columns("image").add_column("image", images, feature=rows.features["image"])
    trainer = make_trainer(broken, **TEXT_ALONE, on_bad_image="skip", max_steps=2)
    trainer.train()
    assert max(logged(trainer, "skipped_rows")) == 1


# ---- The last layers


def graph_of(encoder, trainer):
    """Whether the output of each part of the towers has a graph, in a step."""
    found = []
    for name, module in encoder.named_modules():
        if name.endswith(("embeddings", "pre_layrnorm", "layers.0", "layers.1", "post_layernorm", "final_layer_norm")):
            module.register_forward_hook(lambda _, args, out, name=name: found.append((name, out.requires_grad)))
    trainer.train()
    return {name for name, has_graph in found if has_graph}, {name for name, _ in found}


NORMS = {"vision": "vision_model.post_layernorm", "text": "text_model.final_layer_norm"}


@pytest.mark.parametrize("checkpointed", [{}, {CHECKPOINTING: True}], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("towers", [["vision"], ["text"], ["vision", "text"]], ids="+".join)
def test_the_last_layers_train_without_a_graph_below(make_trainer, towers, layers, checkpointed):
    trainer = make_trainer(
        train_vision_model="vision" in towers,
        train_text_model="text" in towers,
        trainable_layers=layers,
        max_steps=1,
        **checkpointed,
    )
    blocks = {f"{tower}_model.encoder.layers.1" for tower in towers} if layers else set()
    expected = {NORMS[tower] for tower in towers} | blocks
    projections = {"vision": "visual_projection", "text": "text_projection"}
    own = {name.rsplit(".", 1)[0] for name in trained(trainer) if "layers" not in name}
    assert own == {NORMS[tower] for tower in towers} | {projections[tower] for tower in towers}
    assert parts(trained(trainer)) == {part for tower in towers for part in (f"{tower}_model", projections[tower])}
    graph, seen = graph_of(trainer.encoder, trainer)
    assert graph == expected
    assert len(seen) > len(expected) + 3


def test_fewer_layers_keep_fewer_tensors_for_the_backward_pass(make_trainer):
    saved = {}
    for layers in (1, None):
        trainer = make_trainer(trainable_layers=layers, folder=str(layers))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        sizes = saved[layers] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.compute_loss(trainer.model, batch)
    assert sum(saved[1]) < 0.65 * sum(saved[None])


def test_last_layers_and_the_users_freezing_add_up(make_trainer, model):
    model.visual_projection.requires_grad_(False)
    found = trained(make_trainer(model=model, trainable_layers=1))
    assert {name.split(".")[1] for name in found} == {"encoder", "post_layernorm"}


def test_more_layers_than_a_trained_tower_has_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"trainable_layers=3.*vision tower has 2 blocks"):
        make_trainer(trainable_layers=3)
    assert any("layers.0" in name for name in trained(make_trainer(trainable_layers=2)))


@pytest.mark.parametrize("layers", [-1, 1.5, True, "1"])
def test_a_number_of_layers_that_is_none_is_refused(tmp_path, layers):
    with pytest.raises((TypeError, ValueError), match="trainable_layers must be a whole number >= 0"):
        ContrastivePOConfig(str(tmp_path), trainable_layers=layers)


def test_adapters_below_the_last_layers_are_refused(make_trainer, model):
    every = LoraConfig(r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
    for given in ({"peft_config": every}, {"model": get_peft_model(model, every)}):
        with pytest.raises(ValueError, match=r"4 trainable adapter parameters are below the last 1 .*layers\\\.\(1\)"):
            make_trainer(**given, trainable_layers=1)
    last = LoraConfig(r=2, target_modules=r".*vision_model.*layers\.(1)\..*\.(q_proj|v_proj)")
    make_trainer(peft_config=last, trainable_layers=1)


def test_what_trains_beside_adapters_and_would_not_be_saved_is_refused(make_trainer, model):
    config = LoraConfig(
        r=2, target_modules=r".*vision_model.*\.(q_proj|v_proj)", modules_to_save=["visual_projection"]
    )
    adapted = get_peft_model(model, config)
    make_trainer(model=adapted)
    adapted.get_base_model().vision_model.post_layernorm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 trainable parameters .* are not part of its adapters.*modules_to_save"):
        make_trainer(model=adapted)


# ---- Runs go on and are saved as others


def test_a_run_of_the_text_tower_resumes_exactly(make_trainer):
    arguments = {**TEXT_ALONE, "trainable_layers": 1, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(folder="whole", **arguments)
    whole.train()
    resumed = make_trainer(folder="whole", **arguments)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert same(weights(whole.model), weights(resumed.model))
