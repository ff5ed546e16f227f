"""bfloat16, compiled, checkpointed, eager or sdpa attention: the run stays the plain one within its dtype's error."""

import math

import pytest
import samples
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from samples import CHECKPOINTING, PROMPTS, make_preferences
from tolerances import LOGPS, RUNS, TRAINING, rounding
from torch._dynamo.utils import counters
from transformers import CLIPModel

from clip_po.concept.transform import ConceptTransform
from clip_po.dual_encoder import as_dual_encoder
from clip_po.encoding import tokenize

BFLOAT16 = rounding(depth=TRAINING, dtype=torch.bfloat16)
"""Relative. Sums are in float32 here too and each result is rounded once; a wrong gradient is off by its own size."""
COMPILED = {"torch_compile_backend": "eager"}  # traces as inductor does, without its C++
RUN = {
    "per_device_eval_batch_size": 5,
    "optim": "sgd",  # whose updates are as wrong as its gradients, no more
    "learning_rate": 0.02,
    "max_steps": 5,
    "logging_steps": 1,
    "beta": 1.0,
    "eval_dataset": make_preferences(7),
}
KINDS = {
    "full": lambda: {},
    "text": lambda: {"train_text_model": True, "candidate_texts": None},
    "lora": lambda: {"peft_config": adapters(r".*vision_model.*(q_proj|v_proj)"), "learning_rate": 0.5},
    "concept": lambda: {"concept": ConceptTransform(16), "learning_rate": 0.5},
}


def adapters(modules):
    return LoraConfig(r=4, lora_alpha=8, target_modules=modules)


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


def error_of(arguments):
    return BFLOAT16 if "bf16" in arguments else RUNS


@pytest.fixture(scope="module")
def plain(clip_folder, tmp_path_factory):
    """The run of each kind in float32, with none of the arguments under test."""
    folder = tmp_path_factory.mktemp("plain")
    return {kind: trained(samples.make_trainer(clip_folder, folder, **{**RUN, **of()})) for kind, of in KINDS.items()}


EAGER = {"model_init_kwargs": {"attn_implementation": "eager"}}
BF16 = {"bf16": True}
CHECKPOINTED = {CHECKPOINTING: True}


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("full", EAGER),
        ("full", CHECKPOINTED),
        ("full", BF16),
        ("full", {**EAGER, **BF16}),
        ("full", {"precompute_ref_log_probs": False, **BF16}),
        ("text", CHECKPOINTED),
        ("text", {**BF16, **CHECKPOINTED}),
        ("lora", CHECKPOINTED),
        ("lora", BF16),
        ("concept", BF16),
        ("concept", {**COMPILED, **BF16}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_run_stays_the_plain_one_within_its_dtypes_error(make_trainer, plain, kind, arguments):
    found = trained(make_trainer(**KINDS[kind](), **arguments))
    far = distances(found, plain[kind])
    assert max(far.values()) < error_of(arguments)
    assert ("bf16" in arguments) == (far["added"] > RUNS)  # it was in bfloat16 indeed


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_too_the_policy_starts_as_its_reference(make_trainer, kind):
    trainer = make_trainer(**KINDS[kind](), bf16=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=LOGPS)
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=LOGPS)


@pytest.mark.numeric
def test_in_full_precision_the_policys_answers_are_the_models_own(make_trainer, processor):
    trainer = make_trainer(train_text_model=True)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    outputs = trainer.model(
        **tokenize(as_dual_encoder(trainer.model), processor, PROMPTS), pixel_values=batch["pixel_values"]
    )
    del batch["reg_pixel_values"]
    scale = trainer.model.logit_scale.exp()
    logits = outputs.image_embeds @ outputs.text_embeds.T * scale
    found = trainer.policy(trainer.model, trainer.encoder, batch).preference
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=0, atol=LOGPS)


@pytest.mark.numeric
def test_embeddings_kept_between_runs_are_not_taken_for_those_of_another_precision(make_trainer, tmp_path):
    for precision in ({}, BF16):
        trainer = make_trainer(**precision, max_steps=1, precompute_ref_log_probs=True, embeddings_cache=str(tmp_path))
        trainer.train()
        assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=LOGPS)


# ---- Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_run_once_more_where_their_activations_are_checkpointed(make_trainer, plain, reentrant):
    kwargs = {f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(**KINDS["lora"](), **CHECKPOINTED, **kwargs)
    calls = []
    trainer.encoder.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    found = trained(trainer)
    assert max(distances(found, plain["lora"]).values()) < RUNS
    evaluated = 2  # batches
    assert len(calls) == 2 * 5 + evaluated


def test_no_gradient_flows_below_adapters_on_the_last_block(make_trainer):
    last = r".*vision_model.*layers\.1\..*(q_proj|v_proj)"
    trainer = make_trainer(peft_config=adapters(last), learning_rate=0.5, **CHECKPOINTED, max_steps=2)
    needed = []
    blocks = trainer.encoder.vision_model.encoder.layers
    for block in blocks:
        block.register_forward_hook(lambda module, _, output: needed.append((module, output.requires_grad)))
    trainer.train()
    assert set(needed) == {(blocks[0], False), (blocks[1], True)}


# ---- Compiled


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_graph_serves_all_steps_and_its_checkpoints_are_plain_and_resume(make_trainer, plain, tmp_path, kind):
    arguments = {**KINDS[kind](), **COMPILED, **CHECKPOINTED, "save_strategy": "steps", "save_steps": 2}
    # The fourth batch of 13 rows is a ragged one, and evaluations have other batches.
    whole = make_trainer(folder="whole", eval_strategy="steps", eval_steps=2, **arguments)
    assert max(distances(trained(whole), plain[kind]).values()) < RUNS
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    names = {name for file in tmp_path.glob("whole/*/*.safetensors") for name in load_file(file)}
    assert names
    assert not any("_orig_mod" in name for name in names)
    if kind == "full":
        assert names == set(CLIPModel(whole.model.config).state_dict())

    resumed = make_trainer(folder="resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    end = whole.model.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in resumed.model.state_dict().items())


def test_other_numbers_of_texts_are_compiled_for_once_more_and_then_never(make_trainer, plain):
    found = trained(make_trainer(**KINDS["text"](), **COMPILED))
    assert max(distances(found, plain["text"]).values()) < RUNS
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_all_together_and_an_evaluation_before_training_changes_nothing(make_trainer, plain):
    trainer = make_trainer(**COMPILED, **CHECKPOINTED, **BF16)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=LOGPS)
    assert RUNS < max(distances(trained(trainer), plain["full"]).values()) < BFLOAT16


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("full", {}), ("lora", CHECKPOINTED), ("text", BF16), ("concept", BF16)],
    ids=["full-float32", "lora-checkpointed", "text-bf16", "concept-bf16"],
)
def test_what_inductor_makes_of_it_stays_the_plain_run(make_trainer, plain, kind, arguments):
    found = trained(make_trainer(**KINDS[kind](), **arguments, torch_compile=True))
    assert max(distances(found, plain[kind]).values()) < error_of(arguments)
    assert not counters["graph_break"]
