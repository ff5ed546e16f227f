"""Every supported architecture: what the package computes with it is what transformers computes."""

import dataclasses
import json

import pytest
import torch
from dual_encoders import POSITIONS, SUPPORTED, tiny_dual_encoder
from peft import PeftModel
from samples import PROMPTS, TINY_RUN, StopAt, make_preferences, make_trainer, picture, same, weights, write_parquet
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from clip_po.cli import precision
from clip_po.cli.main import main
from clip_po.data.images import to_pixels
from clip_po.encoding import encode_images, encode_texts
from clip_po.evaluation.zero_shot import classify
from clip_po.hub.publishing import save_pretrained
from clip_po.models import load_any, load_model, read_processor

PADDED = {"siglip", "siglip2"}
"""What was trained on texts of the full length."""

TEXTS = ["a", "A photo  of a CAT", "dog", "b" * 2 * POSITIONS]
"""A short text, one with letters and spaces that tokenizers fold, and one that is cut."""

EXACT = {"rtol": 0, "atol": 1e-5}
ROWS = 7


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(precision, "processor_features", frozenset)


@pytest.fixture(scope="module", params=SUPPORTED)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind)
    tiny_dual_encoder(kind, path)
    return path


@dataclasses.dataclass
class Answers:
    """What transformers computes for one image and one text after the other, without padding where there is none."""

    images: torch.Tensor
    texts: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def answers(model, processor, kind, images, texts):
    whole = {"padding": "max_length"} if kind in PADDED else {}
    tokenized = [
        processor.tokenizer([text], truncation=True, max_length=POSITIONS, return_tensors="pt", **whole)
        for text in texts
    ]
    rows = []
    for image in images:
        pixels = processor.image_processor([image], return_tensors="pt")
        rows.append([model.eval()(**pixels, **tokens) for tokens in tokenized])
    return Answers(
        torch.cat([outputs[0].image_embeds for outputs in rows]),
        torch.cat([output.text_embeds for output in rows[0]]),
        torch.stack([torch.stack([output.logits_per_image[0, 0] for output in outputs]) for outputs in rows]),
    )


def pictures(rows=3):
    """Pictures, one of them wide."""
    return [picture(0).resize((48, 32)), *(picture(row) for row in range(1, rows))]


@pytest.fixture(scope="module")
def plain(folder, kind):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    return answers(model, processor, kind, pictures(), TEXTS)


def test_embeddings_are_those_of_transformers(folder, plain):
    model, processor = load_model(str(folder)), read_processor(folder)
    with torch.no_grad():
        images = encode_images(model, to_pixels(processor, pictures()))
    texts = encode_texts(model, processor, TEXTS, batch_size=3)
    torch.testing.assert_close(images, plain.images, **EXACT)
    torch.testing.assert_close(texts, plain.texts, **EXACT)
    assert torch.pdist(texts).min() > 0.05
    assert torch.pdist(images).min() > 0.01


def test_logits_are_those_of_transformers(folder, plain):
    model, processor = load_model(str(folder)), read_processor(folder)
    with torch.no_grad():
        logits = classify(model, to_pixels(processor, pictures()), encode_texts(model, processor, TEXTS))
    torch.testing.assert_close(logits, plain.logits, rtol=1e-5, atol=1e-4)


RUN = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "reg_weight": 0.5, "beta": 0.7}
UNREAD = {"vision_model.embeddings.mask_token"}
"""Parameters of vision towers that no embedding depends on."""


@pytest.fixture(scope="module")
def aligned(folder, tmp_path_factory):
    """A trainer after three steps, in training mode as a run leaves it, and the folder of its model."""
    run = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        str(folder), run, train_dataset=make_preferences(ROWS), eval_dataset=make_preferences(ROWS), **RUN
    )
    trainer.train()
    trainer.save_model(run / "aligned")
    return trainer, run / "aligned"


def test_three_steps_train_the_vision_tower_alone(folder, aligned):
    before, after = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(aligned[1])
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert moved
    assert {name.split(".")[0] for name in moved} <= {"vision_model", "visual_projection"}
    assert not {name for name, _ in before.named_buffers()} & moved, "statistics of batch norm"
    still = {name for name, _ in before.named_parameters() if name.startswith("vision_")} - moved
    assert all("pooler" in name or name in UNREAD for name in still), still


def test_in_training_too_the_policy_starts_as_its_reference(aligned):
    """Also where dropout, paths dropped at random or statistics of the batch would make another model of it."""
    first = aligned[0].state.log_history[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_what_is_saved_is_what_was_trained(folder, kind, aligned):
    trainer, path = aligned
    assert type(AutoModel.from_pretrained(path)) is type(AutoModel.from_pretrained(folder))
    found = answers(AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path), kind, pictures(), TEXTS)
    processor = read_processor(folder)
    trained = trainer.model.eval()
    with torch.no_grad():
        images = encode_images(trained, to_pixels(processor, pictures()))
    torch.testing.assert_close(found.images, images, **EXACT)
    torch.testing.assert_close(found.texts, encode_texts(trained, processor, TEXTS), **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saved_processor_pads_on_the_side_on_which_it_padded(folder, kind, side, tmp_path):
    model, processor = load_model(folder), read_processor(folder)
    processor.tokenizer.padding_side = side  # transformers saves it only if it was read from a file
    save_pretrained(tmp_path, model, processor, {})
    read_back = read_processor(tmp_path)
    assert read_back.tokenizer.padding_side == side


def test_the_loss_is_the_equation_of_what_transformers_answers(folder, kind, aligned):
    """DPO and the KL of the softmax over the candidate texts, from plain logits before and after."""
    trainer, path = aligned
    rows = make_preferences(ROWS)
    chosen = torch.tensor([[PROMPTS.index(text)] for text in rows["chosen"]])
    rejected = torch.tensor([[PROMPTS.index(text)] for text in rows["rejected"]])

    def logps(checkpoint, column):
        model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
        return answers(model, processor, kind, rows[column], PROMPTS).logits.log_softmax(-1)

    policy, reference = logps(path, "image"), logps(folder, "image")
    ratio = policy - reference
    dpo = -F.logsigmoid(0.7 * (ratio.gather(1, chosen) - ratio.gather(1, rejected))).mean()
    policy, reference = logps(path, "clean_image"), logps(folder, "clean_image")
    kl = (reference.exp() * (reference - policy)).sum(-1).mean()
    result = trainer.evaluate()
    assert kl > 1e-5
    assert result["eval_loss"] == pytest.approx((dpo + 0.5 * kl).item(), abs=1e-4)
    assert result["eval_kl"] == pytest.approx(kl.item(), abs=1e-4)


def without_gradient(trainer):
    """Names of trained parameters that a step gives no gradient, for which several processes would wait in vain."""
    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]])).backward()
    return [name for name, value in trainer.model.named_parameters() if value.requires_grad and value.grad is None]


def test_every_trained_parameter_gets_a_gradient(folder, tmp_path):
    assert not without_gradient(make_trainer(str(folder), tmp_path, train_text_model=True, train_logit_scale=True))


SAVED = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "train_text_model": True}


def test_a_run_resumes_exactly(folder, tmp_path):
    whole = make_trainer(str(folder), tmp_path / "whole", **SAVED)
    whole.train()
    make_trainer(str(folder), tmp_path / "cut", callbacks=[StopAt(2)], **SAVED).train()
    resumed = make_trainer(str(folder), tmp_path / "cut", **SAVED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert same(weights(resumed.model), weights(whole.model))


def test_the_best_checkpoint_is_loaded_in_the_end(folder, tmp_path):
    """Trainer takes the names in the file as they are, and transformers writes some models under other names."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
    trainer = make_trainer(
        str(folder), tmp_path, eval_dataset=make_preferences(4), eval_strategy="steps", eval_steps=1, **best, **SAVED
    )
    trainer.train()
    chosen = trainer.state.best_model_checkpoint
    assert same(weights(trainer.model), weights(AutoModel.from_pretrained(chosen)))
    assert same(weights(trainer.model), weights(load_model(chosen)))
    others = {load_model(str(path)) for path in tmp_path.glob("checkpoint-*") if str(path) != chosen}
    assert not any(same(weights(trainer.model), weights(other)) for other in others)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), train=8, test=8)


# Layers of attention and MLP in the two blocks of a transformer: four and two.
LINEAR_LAYERS = 2 * (4 + 2)


def test_the_commands_train_and_evaluate_lora_by_name(folder, kind, parquet, tmp_path):
    out, merged, evaluated = tmp_path / "adapters", tmp_path / "merged", tmp_path / "evaluation"
    data = ["--dataset_name", str(parquet)]
    settings = ["--use_peft", "true", "--learning_rate", "1e-2", *TINY_RUN]
    assert main(["train", "--model_name_or_path", str(folder), *data, "--output_dir", str(out), *settings]) == 0

    adapted = load_any(str(out)).eval()
    assert isinstance(adapted, PeftModel)
    adapters = {name: value for name, value in adapted.named_parameters() if "lora_B" in name}
    assert all(".vision_model." in name for name in adapters)
    assert all(bool(value.any()) for value in adapters.values()), "an adapter without effect stays 0"
    assert kind == "align" or len(adapters) >= LINEAR_LAYERS

    with torch.no_grad():
        images = encode_images(adapted, to_pixels(read_processor(folder), pictures()))
    adapted.merge_and_unload().save_pretrained(merged)
    plain = answers(AutoModel.from_pretrained(merged), AutoProcessor.from_pretrained(out), kind, pictures(), ["a"])
    torch.testing.assert_close(plain.images, images, **EXACT)

    command = ["evaluate", "--model_name_or_path", str(out), *data, "--output_dir", str(evaluated)]
    assert main([*command, "--num_workers", "0", "--batch_size", "8"]) == 0
    assert json.loads((evaluated / "report.json").read_text())
