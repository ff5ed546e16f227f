"""Towers that encode a part at a time: the gradients of a whole batch in the memory of a part."""

import pytest
import torch
from dual_encoders import SUPPORTED, tiny_dual_encoder
from peft import LoraConfig
from samples import (
    CHECKPOINTING,
    PROMPTS,
    logged,
    make_image_pairs,
    make_preferences,
    make_trainer,
    picture,
    tiny_config,
    tiny_processor,
)
from tolerances import RUNS
from transformers import CLIPModel

from clip_po.chunked_towers import in_chunks
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.images import to_pixels
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import tokenize, unit_norm
from clip_po.models import load_model, read_processor
from clip_po.trainable import tower_of

BOTH = {"train_text_model": True, "train_logit_scale": True}
MANY = [f"a {first}{second}" for first in "abcdefgh" for second in "stuvwxyz"]


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return CLIPModel(tiny_config()).to(dtype)


def trainer_of(folder, **arguments):
    given = {"processing_class": tiny_processor(), "report_to": "none", **BOTH, **arguments}
    return make_trainer(given.pop("model", None) or model(), folder, **given)


def gradients(trainer, rows=6):
    """The loss and the gradients of one batch."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


CASES = {
    "texts": {"candidate_texts": [*PROMPTS, *MANY]},
    "in-batch": {"candidate_texts": None, "in_batch_candidates": True},
    "images": {
        "train_dataset": lambda: make_image_pairs(8, rejected=2),
        "candidate_texts": None,
        "reg_weight": 0.0,
    },
    "text-tower": {"candidate_texts": [*PROMPTS, *MANY], "train_vision_model": False},
    "adapters": {
        "candidate_texts": [*PROMPTS, *MANY],
        "train_logit_scale": False,
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "fc1"]),
    },
    "checkpointed": {"candidate_texts": [*PROMPTS, *MANY], CHECKPOINTING: True},
}


@pytest.mark.numeric
@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradients_are_those_of_the_whole_batch(tmp_path, case, size):
    found = {}
    for chunk in (None, size):
        given = dict(case)
        if "train_dataset" in given:
            given["train_dataset"] = given["train_dataset"]()
        torch.manual_seed(0)
        found[chunk] = gradients(trainer_of(tmp_path / str(chunk), tower_chunk_size=chunk, **given))
    (loss, whole), (chunked_loss, chunked) = found[None], found[size]
    torch.testing.assert_close(chunked_loss, loss, atol=1e-6, rtol=0)
    assert whole.keys() == chunked.keys()
    assert sum(float(gradient.abs().max()) > 1e-6 for gradient in whole.values()) > 5
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-6, rtol=0)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_gradients_of_every_architecture_are_those_of_the_whole_batch(tmp_path, kind):
    tiny_dual_encoder(kind, tmp_path)
    found = []
    for chunk in (None, 2):
        # ALIGN's vision tower normalizes over the batch, except in evaluation mode.
        loaded, processor = load_model(str(tmp_path)).double().eval(), read_processor(str(tmp_path))
        encoder = as_dual_encoder(loaded)
        pixels = to_pixels(processor, [picture(number) for number in range(5)]).double()
        with in_chunks(encoder, chunk):
            inputs = encoder.inputs(pixels, tokenize(encoder, processor, PROMPTS))
            images, texts = map(unit_norm, encoder.features_of(loaded(**inputs)))
        encoder.logits(images, texts).log_softmax(dim=-1)[:, 1].sum().backward()
        found.append({name: p.grad for name, p in loaded.named_parameters() if p.grad is not None})
    whole, chunked = found
    assert whole.keys() == chunked.keys()
    assert {tower_of(name) for name in whole} == {"vision", "text", None}
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-6, rtol=1e-6)


def kept_for_backward(texts, chunk):
    """The number of values that the graph of the text embeddings holds, outside of what is computed again."""
    encoder, sizes = as_dual_encoder(model(torch.float32)), {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.model.parameters()}
    tokens = tokenize(encoder, tiny_processor(), texts)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), in_chunks(encoder, chunk):
        _, features = encoder.features_of(encoder.model(**encoder.inputs(pixels, tokens)))
        unit_norm(features).sum()
    return sum(size for place, size in sizes.items() if place not in parameters)


def test_memory_hardly_grows_with_the_number_of_candidates():
    growth = {
        chunk: (kept_for_backward(MANY, chunk) - kept_for_backward(MANY[:16], chunk)) / 48 for chunk in (None, 8)
    }
    # With chunks, a text keeps its token ids and a few vectors of the size of an embedding.
    assert growth[8] < 0.05 * growth[None]
    assert growth[8] < 1500


def test_towers_are_as_before_after_the_block():
    encoder = as_dual_encoder(model(torch.float32))
    own = encoder.model.text_model

    def fail():
        with in_chunks(encoder, 2):
            assert "forward" in vars(own)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert "forward" not in vars(own)


@pytest.mark.numeric
def test_a_run_in_chunks_is_the_run(tmp_path):
    logs = []
    for chunk in (None, 2):
        run = {"learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1, "optim": "sgd", "tower_chunk_size": chunk}
        trainer = trainer_of(tmp_path / str(chunk), train_dataset=make_preferences(8), **run)
        trainer.train()
        logs.append(logged(trainer, "loss"))
    assert logs[0] == pytest.approx(logs[1], rel=RUNS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tower_chunk_size": 0}, "tower_chunk_size must be a whole number >= 1"),
        (
            {"tower_chunk_size": 8, "train_vision_model": False, "train_logit_scale": True},
            "tower_chunk_size=8 has no effect, because no tower trains",
        ),
    ],
)
def test_a_size_without_effect_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastivePOConfig(str(tmp_path), **arguments)


def test_chunks_are_refused_where_they_were_not_tried(tmp_path):
    with pytest.raises(ValueError, match="tower_chunk_size=8 changes how a tower is called"):
        trainer_of(tmp_path, tower_chunk_size=8, torch_compile=True)
    with pytest.raises(ValueError, match="tower_chunk_size=8 has no effect: ConceptTrainer"):
        make_trainer(model(), tmp_path, concept=ConceptTransform(16), tower_chunk_size=8)


def test_a_tower_that_normalizes_over_the_batch_is_refused(tmp_path):
    tiny_dual_encoder("align", tmp_path / "model")
    with pytest.raises(ValueError, match="tower_chunk_size=8 would change the answers of AlignModel"):
        make_trainer(str(tmp_path / "model"), tmp_path, tower_chunk_size=8)
