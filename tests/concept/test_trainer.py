"""A transformation of embeddings trained by the one trainer: no tower runs, the model stays, a fold says the same."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from samples import CHECKPOINTING, PROMPTS, logged, make_labelled, make_preferences, weights
from tolerances import LOGPS
from torch.nn import functional as F
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images, encode_texts
from clip_po.losses import kl_regularization
from clip_po.policy import candidate_logps

RUN = {"learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "beta": 1.0}


@pytest.fixture
def make_concept_trainer(make_trainer):
    def make(rows=None, concept=None, **arguments):
        return make_trainer(rows, concept=concept or ConceptTransform(16), **arguments)

    return make


@pytest.mark.numeric
def test_the_loss_is_the_equation(make_concept_trainer, processor):
    concept = ConceptTransform(16)
    with torch.no_grad():
        concept.image_weight += 0.05 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    rows = make_preferences(4)
    trainer = make_concept_trainer(rows, concept, loss_type="sft", reg_weight=0.7, penalty_weight=0.3)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    model = trainer.encoder
    texts, scale = encode_texts(model, processor, PROMPTS), model.logit_scale.exp()
    with torch.no_grad():
        images, cleans = (encode_images(model, to_pixels(processor, list(rows[c]))) for c in ("image", "clean_image"))
        said, on_clean = (candidate_logps(*concept(embeds, texts), scale) for embeds in (images, cleans))
        kl = kl_regularization(candidate_logps(cleans, texts, scale), on_clean).mean()
        chosen = F.nll_loss(said, torch.tensor([PROMPTS.index(text) for text in rows["chosen"]]))
        expected = chosen + 0.7 * kl + 0.3 * (torch.eye(16) - concept.image_weight @ concept.image_weight.T).norm()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=0, atol=LOGPS)


def test_training_runs_on_embeddings_and_the_model_stays(make_concept_trainer):
    trainer = make_concept_trainer(num_train_epochs=3, max_steps=-1, loss_type="sft", reg_weight=0.1)
    before, calls = weights(trainer.encoder), []
    for tower in (trainer.encoder.vision_model, trainer.encoder.text_model):
        tower.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    # 13 images and 13 clean ones in batches of 8, and the prompts once: no more in 12 steps.
    assert len(calls) == 2 + 2 + 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.encoder).items())
    assert trainer.model.penalty() > 0
    first, *_, last = logged(trainer, "loss")
    assert last < first


def test_rows_come_without_images_once_their_embeddings_are_known(make_concept_trainer, labelled):
    attack = TypographicAttack(["cat", "dog", "bird"], min_side=32, redraw="never")
    trainer = make_concept_trainer(TypographicPreferences(labelled, attack), max_steps=2)
    with_images = trainer.train_dataset[0, 3, 5]
    trainer.train()
    row = trainer.train_dataset[0, 3, 5]
    assert {"image", "reg_image"} & set(row) == set()
    assert {name: row[name] for name in ("chosen", "rejected", "weight")} == {
        name: with_images[name] for name in ("chosen", "rejected", "weight")
    }


def test_attacks_drawn_anew_train_too(make_concept_trainer, labelled):
    rows = TypographicPreferences(labelled, TypographicAttack(["cat", "dog", "bird"], min_side=32))
    trainer = make_concept_trainer(rows, loss_type=["distillation", "sft"], reg_dataset=make_labelled(5))
    start = weights(trainer.model)
    trainer.train()
    assert not torch.equal(trainer.model.image_weight, start["image_weight"])


@pytest.mark.numeric
def test_micro_batches_add_up_to_one_penalty(make_concept_trainer):
    ends = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make_concept_trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            penalty_weight=0.5,
            folder=f"run-{size}",
        )
        trainer.train()
        ends.append(trainer.model.image_weight)
    torch.testing.assert_close(*ends)


def test_a_resumed_run_ends_with_the_same_weights(make_concept_trainer):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_concept_trainer(folder="whole", **saving)
    whole.train()
    resumed = make_concept_trainer(folder="resumed", **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert torch.equal(whole.model.image_weight, resumed.model.image_weight)


def test_what_was_saved_folds_into_a_plain_model_that_says_the_same(make_concept_trainer, processor, tmp_path):
    trainer = make_concept_trainer()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    ConceptTransform.load(trainer.args.output_dir).fold_into(trainer.encoder).save_pretrained(tmp_path / "plain")
    plain = CLIPModel.from_pretrained(tmp_path / "plain")
    rows = make_preferences(4)
    pixels = to_pixels(processor, list(rows["image"]))
    with torch.no_grad():
        images, texts = encode_images(trainer.encoder, pixels), encode_texts(trainer.encoder, processor, PROMPTS)
        torch.testing.assert_close(encode_images(plain, pixels), trainer.model(images, texts)[0], atol=1e-5, rtol=0)
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'ConceptTransform.from_pretrained("run")' in card
    assert "penalty_weight" in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train_text_model": True}, "train_text_model=True"),
        ({"train_logit_scale": True}, "train_logit_scale=True"),
        ({CHECKPOINTING: True}, "activation_checkpointing=True"),
        ({"concept": ConceptTransform(8)}, "8"),
        ({"penalty_weight": -1.0}, "penalty_weight"),
    ],
)
def test_what_a_concept_can_not_be_trained_with_is_refused(make_concept_trainer, arguments, said):
    with pytest.raises(ValueError, match=said):
        make_concept_trainer(**arguments)


@pytest.mark.parametrize("argument", ["peft_config", "ref_model"])
def test_a_concept_has_neither_adapters_nor_another_reference(make_concept_trainer, argument):
    with pytest.raises(TypeError, match=argument):
        make_concept_trainer(**{argument: None})


def test_a_penalty_that_is_not_finite_stops_training(make_concept_trainer):
    concept = ConceptTransform(16)
    with torch.no_grad():
        concept.image_weight *= 1e11
    with pytest.raises(FloatingPointError, match=r"loss is inf.*loss/penalty"):
        make_concept_trainer(concept=concept).train()


@pytest.mark.parametrize("towers", ["vision", "text", "both"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_adapters_of_any_tower_are_frozen_with_the_model(towers, is_trainable, make_concept_trainer, model, tmp_path):
    part = {"vision": "vision_model", "text": "text_model", "both": ""}[towers]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=rf".*{part}.*q_proj", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters")
    base = CLIPModel.from_pretrained(model.config.name_or_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters", is_trainable=is_trainable)
    trainer = make_concept_trainer(model=loaded, max_steps=1)
    before = weights(loaded)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(loaded).items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert logged(trainer, "loss")
