"""bfloat16, compiled, checkpointed, eager or sdpa attention: the run stays the plain one within its dtype's error."""

import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from samples import CHECKPOINTING, PROMPTS, make_preferences, run_config
from torch._dynamo.utils import counters
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.policy import tokenize
from clip_po.trainer import ContrastivePOTrainer

FLOAT32 = 1e-5
BFLOAT16 = 2.0**-8
"""Relative distance of neighbouring numbers."""
ROUNDINGS = 16
"""What adds up over layers, steps and the difference of two texts' gradients; a wrong gradient is off by hundreds."""
COMPILED = {"torch_compile_backend": "eager"}  # traces as inductor does, without its C++
KINDS = {
    "full": {},
    "text": {"train_text_model": True, "candidate_texts": None},
    "lora": {"adapters": r".*vision_model.*(q_proj|v_proj)"},
    "concept": {"concept": True},
}


@pytest.fixture(scope="module")
def make_trainer(clip_folder, tmp_path_factory):
    def make(folder=None, adapters=None, concept=False, candidate_texts=PROMPTS, attention="sdpa", **arguments):
        config = {
            "per_device_eval_batch_size": 5,
            "optim": "sgd",  # whose updates are as wrong as its gradients, no more
            "learning_rate": 0.5 if adapters or concept else 0.02,
            "max_steps": 5,
            "logging_steps": 1,
            "beta": 1.0,
            "model_init_kwargs": {"attn_implementation": attention},
            **arguments,
        }
        return ContrastivePOTrainer(
            str(clip_folder),
            args=run_config(folder or tmp_path_factory.mktemp("run"), **config),
            train_dataset=make_preferences(13),
            eval_dataset=make_preferences(7),
            candidate_texts=candidate_texts,
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=adapters) if adapters else None,
            concept=ConceptTransform(16) if concept else None,
        )

    return make


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def trained(trainer):
    """The run's losses, evaluation, and what it added to all trained weights, as tensors."""
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    added = torch.cat([(end.detach() - begin).flatten() for begin, end in zip(start, parameters, strict=True)])
    evaluation = trainer.evaluate()
    return {
        "losses": torch.tensor(losses),
        "evaluation": torch.tensor([evaluation["eval_loss"], evaluation["eval_logps/chosen"]]),
        "added": added,
    }


def distances(found, plain):
    """Relative to the plain run's, of each of its tensors."""
    return {name: ((found[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}


@pytest.fixture(scope="module")
def plain(make_trainer):
    return {kind: trained(make_trainer(**arguments)) for kind, arguments in KINDS.items()}


BF16 = {"bf16": True}
CHECKPOINTED = {CHECKPOINTING: True}


@pytest.mark.parametrize(
    ("kind", "arguments", "error"),
    [
        ("full", {"attention": "eager"}, FLOAT32),
        ("full", CHECKPOINTED, FLOAT32),
        ("full", BF16, BFLOAT16),
        ("full", {"attention": "eager", **BF16}, BFLOAT16),
        ("full", {"precompute_ref_log_probs": False, **BF16}, BFLOAT16),
        ("text", CHECKPOINTED, FLOAT32),
        ("text", {**BF16, **CHECKPOINTED}, BFLOAT16),
        ("lora", CHECKPOINTED, FLOAT32),
        ("lora", BF16, BFLOAT16),
        ("concept", BF16, BFLOAT16),
        ("concept", {**COMPILED, **BF16}, BFLOAT16),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_run_stays_the_plain_one_within_its_dtypes_error(make_trainer, plain, kind, arguments, error):
    found = trained(make_trainer(**KINDS[kind], **arguments))
    far = distances(found, plain[kind])
    assert max(far.values()) < ROUNDINGS * error
    assert ("bf16" in arguments) == (far["added"] > FLOAT32)  # it was in bfloat16 indeed


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_too_the_policy_starts_as_its_reference(make_trainer, kind):
    trainer = make_trainer(**KINDS[kind], bf16=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


def test_in_full_precision_the_policys_answers_are_the_models_own(make_trainer, processor):
    trainer = make_trainer(train_text_model=True)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    outputs = trainer.model(**tokenize(trainer.model, processor, PROMPTS), pixel_values=batch["pixel_values"])
    del batch["reg_pixel_values"]
    logits = outputs.image_embeds @ outputs.text_embeds.T * trainer.model.logit_scale.exp()
    found = trainer.policy(trainer.model, trainer.encoder, batch).preference
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=0, atol=1e-6)


def test_embeddings_kept_between_runs_are_not_taken_for_those_of_another_precision(make_trainer, tmp_path):
    for precision in ({}, BF16):
        trainer = make_trainer(**precision, max_steps=1, precompute_ref_log_probs=True, embeddings_cache=str(tmp_path))
        trainer.train()
        assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


# ---- Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_run_once_more_where_their_activations_are_checkpointed(make_trainer, plain, reentrant):
    kwargs = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(**KINDS["lora"], **CHECKPOINTED, **kwargs)
    calls = []
    trainer.encoder.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    found = trained(trainer)
    assert max(distances(found, plain["lora"]).values()) < FLOAT32
    evaluated = 2  # batches
    assert len(calls) == 2 * 5 + evaluated


def test_no_gradient_flows_below_adapters_on_the_last_block(make_trainer):
    last = r".*vision_model.*layers\.1\..*(q_proj|v_proj)"
    trainer = make_trainer(adapters=last, **CHECKPOINTED, max_steps=2)
    needed = []
    blocks = trainer.encoder.vision_model.encoder.layers
    for block in blocks:
        block.register_forward_hook(lambda module, _, output: needed.append((module, output.requires_grad)))
    trainer.train()
    assert set(needed) == {(blocks[0], False), (blocks[1], True)}


# ---- Compiled


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_graph_serves_all_steps_and_its_checkpoints_are_plain_and_resume(make_trainer, plain, tmp_path, kind):
    arguments = {**KINDS[kind], **COMPILED, **CHECKPOINTED, "save_strategy": "steps", "save_steps": 2}
    # The fourth batch of 13 rows is a ragged one, and evaluations have other batches.
    whole = make_trainer(tmp_path / "whole", eval_strategy="steps", eval_steps=2, **arguments)
    assert max(distances(trained(whole), plain[kind]).values()) < ROUNDINGS * FLOAT32
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    names = {name for file in tmp_path.glob("whole/*/*.safetensors") for name in load_file(file)}
    assert names
    assert not any("_orig_mod" in name for name in names)
    if kind == "full":
        assert names == set(CLIPModel(whole.model.config).state_dict())

    resumed = make_trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    end = whole.model.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in resumed.model.state_dict().items())


def test_other_numbers_of_texts_are_compiled_for_once_more_and_then_never(make_trainer, plain):
    found = trained(make_trainer(**KINDS["text"], **COMPILED))
    assert max(distances(found, plain["text"]).values()) < ROUNDINGS * FLOAT32
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_all_together_and_an_evaluation_before_training_changes_nothing(make_trainer, plain):
    trainer = make_trainer(**COMPILED, **CHECKPOINTED, **BF16)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert FLOAT32 < max(distances(trained(trainer), plain["full"]).values()) < ROUNDINGS * BFLOAT16


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "arguments", "error"),
    [("full", {}, FLOAT32), ("lora", CHECKPOINTED, FLOAT32), ("text", BF16, BFLOAT16), ("concept", BF16, BFLOAT16)],
    ids=["full-float32", "lora-checkpointed", "text-bf16", "concept-bf16"],
)
def test_what_inductor_makes_of_it_stays_the_plain_run(make_trainer, plain, kind, arguments, error):
    found = trained(make_trainer(**KINDS[kind], **arguments, torch_compile=True))
    assert max(distances(found, plain[kind]).values()) < ROUNDINGS * error
    assert not counters["graph_break"]
