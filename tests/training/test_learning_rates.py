"""Learning rates by tower and by depth."""

import re

import pytest
import torch
from dual_encoders import SUPPORTED, tiny_dual_encoder
from peft import LoraConfig
from samples import logged, make_trainer, same, tiny_config, tiny_processor, weights
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.trainable import tower_of

RUN = {"processing_class": tiny_processor(), "learning_rate": 0.01, "logging_steps": 1, "max_steps": 4}
BOTH = {"train_text_model": True, "train_logit_scale": True}


def model():
    torch.manual_seed(0)
    return CLIPModel(tiny_config())


def rates_of(trainer):
    """The learning rate and the weight decay of each parameter in the optimizer."""
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = optimizer.param_groups
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_each_tower_and_block_has_its_rate(tmp_path):
    decays = {"weight_decay": 0.1, "vision_learning_rate": 0.1, "text_learning_rate": 0.02, "layer_decay": 0.5}
    found = rates_of(make_trainer(model(), tmp_path, **RUN, **BOTH, **decays))
    plain = rates_of(make_trainer(model(), tmp_path, **RUN, **BOTH, weight_decay=0.1))
    assert {name: decay for name, (_, decay) in found.items()} == {name: decay for name, (_, decay) in plain.items()}
    assert {rate for rate, _ in plain.values()} == {0.01}
    expected = {  # the tiny towers have two blocks
        "logit_scale": 0.01,
        "visual_projection.weight": 0.1,
        "vision_model.post_layernorm.weight": 0.1,
        "vision_model.encoder.layers.1.mlp.fc1.weight": 0.05,
        "vision_model.encoder.layers.0.mlp.fc1.bias": 0.025,
        "vision_model.pre_layrnorm.weight": 0.0125,
        "vision_model.embeddings.class_embedding": 0.0125,
        "vision_model.embeddings.patch_embedding.weight": 0.0125,
        "text_projection.weight": 0.02,
        "text_model.final_layer_norm.bias": 0.02,
        "text_model.encoder.layers.1.layer_norm2.weight": 0.01,
        "text_model.encoder.layers.0.self_attn.q_proj.weight": 0.005,
        "text_model.embeddings.token_embedding.weight": 0.0025,
        "text_model.embeddings.position_embedding.weight": 0.0025,
    }
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    assert len(found) == len(plain) == sum(1 for _ in model().parameters())


@pytest.mark.parametrize("kind", SUPPORTED)
def test_rates_fall_from_the_top_of_every_architecture(tmp_path, kind):
    tiny_dual_encoder(kind, tmp_path / "model")
    given = {"learning_rate": 1.0, "train_text_model": True, "layer_decay": 0.5}
    found = {
        name: rate for name, (rate, _) in rates_of(make_trainer(str(tmp_path / "model"), tmp_path, **given)).items()
    }
    for tower in ("vision", "text"):
        own = {name: rate for name, rate in found.items() if tower_of(name) == tower}
        blocks = {name: int(n[1]) for name in own if (n := re.search(r"\.(?:layers?|blocks?)\.(\d+)\.", name))}
        last = max(blocks.values())
        assert {(n, own[name]) for name, n in blocks.items()} == {(n, 0.5 ** (last + 1 - n)) for n in range(last + 1)}
        bottom = {rate for name, rate in own.items() if re.search(r"\.embeddings?\.", name)}
        assert bottom == {0.5 ** (last + 2)}
        rest = {rate for name, rate in own.items() if name not in blocks and "embedding" not in name}
        assert rest <= {1.0, 0.5 ** (last + 2)}
        assert 1.0 in rest or (kind, tower) == ("align", "vision")  # nothing above its blocks


@pytest.mark.numeric
def test_a_step_moves_each_parameter_in_proportion_to_its_rate(tmp_path):
    """Plain gradient descent: the change is the rate times the same gradient."""
    moved = {}
    for name, given in (("plain", {}), ("rates", {"text_learning_rate": 0.005, "layer_decay": 0.5})):
        run = {**RUN, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1, "max_grad_norm": 0}
        trainer = make_trainer(model().double(), tmp_path / name, **run, **BOTH, **given)
        before, rates = weights(trainer.model), rates_of(trainer)
        trainer.train()
        moved[name] = {key: (value - before[key]) / rates[key][0] for key, value in weights(trainer.model).items()}
    assert sum(float(change.abs().max()) > 0 for change in moved["plain"].values()) > 50
    for key, change in moved["plain"].items():
        torch.testing.assert_close(moved["rates"][key], change, atol=1e-9, rtol=1e-6)


def test_the_rates_are_logged_and_follow_the_schedule(tmp_path):
    trainer = make_trainer(model(), tmp_path, **RUN, **BOTH, text_learning_rate=0.002, layer_decay=0.9)
    trainer.train()
    shares = [1.0, 0.75, 0.5, 0.25]
    for name, rate in (("learning_rate/vision", 0.01), ("learning_rate/text", 0.002), ("learning_rate", 0.01)):
        assert logged(trainer, name) == pytest.approx([rate * share for share in shares])


def test_runs_with_one_rate_log_no_others(tmp_path):
    trainer = make_trainer(model(), tmp_path, **RUN)
    trainer.train()
    assert not logged(trainer, "learning_rate/vision")
    assert len(trainer.optimizer.param_groups) == 2


def test_a_run_with_several_rates_resumes_exactly(tmp_path):
    run = {**RUN, **BOTH, "layer_decay": 0.7, "text_learning_rate": 0.003, "weight_decay": 0.1}
    run |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model(), tmp_path, **run)
    whole.train()
    resumed = make_trainer(model(), tmp_path, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    assert logged(resumed, "learning_rate/text") == logged(whole, "learning_rate/text")
    other = make_trainer(model(), tmp_path, **{**run, "layer_decay": 0.8})
    with pytest.raises(ValueError, match="layer_decay"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_adapters_have_the_rates_of_their_blocks(tmp_path):
    adapters = LoraConfig(r=2, target_modules=["q_proj"])
    given = {"train_text_model": True, "layer_decay": 0.5, "text_learning_rate": 0.1, "peft_config": adapters}
    found = rates_of(make_trainer(model(), tmp_path, **RUN, **given))
    for tower, rate in (("vision", 0.01), ("text", 0.1)):
        for block, share in ((1, 0.5), (0, 0.25)):
            part = f"{tower}_model.encoder.layers.{block}."
            assert [found[name][0] for name in found if part in name] == pytest.approx([rate * share] * 2)
    assert len(found) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_learning_rate": 1e-3}, r"text_learning_rate=0.001 has no effect with train_text_model=False"),
        (
            {"train_vision_model": False, "train_text_model": True, "vision_learning_rate": 0.1},
            r"vision_learning_rate=0.1 has no effect",
        ),
        ({"trainable_layers": 0, "layer_decay": 0.5}, r"layer_decay=0.5 has no effect"),
        ({"train_vision_model": False, "train_logit_scale": True, "layer_decay": 0.5}, "no block"),
        ({"layer_decay": 0.0}, r"layer_decay must lie in \(0, 1\]"),
        ({"layer_decay": 1.1}, r"layer_decay must lie in \(0, 1\]"),
        ({"vision_learning_rate": -1.0}, "vision_learning_rate must be a finite number >= 0"),
    ],
)
def test_rates_without_effect_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePOConfig(str(tmp_path), **arguments)


def test_rates_of_what_the_user_froze_are_refused(tmp_path):
    frozen = model()
    frozen.text_model.requires_grad_(False)
    frozen.text_projection.requires_grad_(False)
    with pytest.raises(ValueError, match=r"text_learning_rate=0.1 has no effect, because the model was passed with"):
        make_trainer(frozen, tmp_path, **RUN, train_text_model=True, text_learning_rate=0.1)


def test_an_optimizer_of_the_user_has_its_own_rates(tmp_path):
    given = model()
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer_decay=0.5 has no effect with optimizers"):
        make_trainer(given, tmp_path, **RUN, layer_decay=0.5, optimizers=(optimizer, None))


def test_a_transformation_has_no_towers(tmp_path):
    with pytest.raises(ValueError, match=r"layer_decay=0.5 has no effect: ConceptTrainer"):
        make_trainer(model(), tmp_path, concept=ConceptTransform(16), **RUN, layer_decay=0.5)
