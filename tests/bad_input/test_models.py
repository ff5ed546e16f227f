"""Models, processors, adapters and embeddings that do not belong together are refused, never read half."""

import json
import shutil

import pytest
import torch
from bad_input.table import NAN, case, check
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from samples import CLASSES, PROMPTS, make_labelled, tiny_config, tiny_processor
from transformers import BertConfig, BertModel, CLIPModel, CLIPVisionModelWithProjection

from clip_po.concept.transform import ConceptTransform
from clip_po.data.embedding_cache import EmbeddingCache
from clip_po.encoding import encode_texts
from clip_po.evaluation.interpolation import interpolate
from clip_po.evaluation.retrieval import evaluate_retrieval
from clip_po.evaluation.zero_shot import classify, zero_shot_accuracy
from clip_po.losses import LossSettings, PreferenceLogps, preference_loss
from clip_po.models import load_any, load_model
from clip_po.policy import candidate_logps

WEIGHTS = "model.safetensors"
ADAPTERS = "adapter_model.safetensors"
VISION = r".*vision_model.*\.(q_proj|v_proj)"


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": VISION, **changes})


def folder(bench, change):
    """A copy of the tiny CLIP with something changed."""
    copy = bench.folder / "changed"
    shutil.copytree(bench.clip, copy)
    change(copy)
    return str(copy)


def with_weights(change):
    def rewrite(copy):
        save_file(change(load_file(copy / WEIGHTS)), copy / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def saved(bench, model):
    model.save_pretrained(bench.folder / "other")
    return str(bench.folder / "other")


def larger():
    return CLIPModel(tiny_config(vision={"hidden_size": 64}))


def spoiled(bench, part="visual_projection"):
    model = CLIPModel.from_pretrained(bench.clip)
    with torch.no_grad():
        getattr(model, part).weight[0, 0] = NAN
    return model


def adapters(bench, model=None, base=None, change=lambda path: None, **config):
    """Adapters of a model in a folder, which name `base` as theirs."""
    path = bench.folder / "adapters"
    adapted = get_peft_model(model or CLIPModel.from_pretrained(bench.clip), lora(**config))
    adapted.save_pretrained(path)
    file = path / "adapter_config.json"
    named = {**json.loads(file.read_text()), "base_model_name_or_path": base}
    file.write_text(json.dumps(named))
    change(path)
    return str(path)


def more_tokens():
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"token{number}" for number in range(20)])
    return processor


def zero_shot(bench, model=None, processor=None):
    return zero_shot_accuracy(
        model or bench.model,
        processor or bench.processor,
        make_labelled(4),
        ["a photo of a {}"],
        CLASSES,
        disable_tqdm=True,
    )


def retrieval(bench, model):
    rows = make_labelled(4).add_column("caption", PROMPTS)
    return evaluate_retrieval({"it": model}, bench.processor, rows, disable_tqdm=True)


MODELS = {
    "weights-are-nan": case(
        lambda b: b.trainer(model=folder(b, with_weights(lambda w: {**w, "logit_scale": w["logit_scale"] * NAN}))),
        ValueError,
        "1 weights of model hold nan",
        "'logit_scale'",
        "earlier checkpoint",
    ),
    "reference-is-nan": case(
        lambda b: b.trainer(ref_model=spoiled(b)), ValueError, "ref_model hold nan", "visual_projection.weight"
    ),
    "weights-are-cut": case(
        lambda b: load_model(folder(b, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]))),
        ValueError,
        "changed' are not readable",
        "download them again",
    ),
    "weights-are-empty": case(
        lambda b: load_model(folder(b, lambda f: (f / WEIGHTS).write_bytes(b""))), ValueError, "are not readable"
    ),
    "weights-lack-a-tower": case(
        lambda b: load_model(
            folder(b, with_weights(lambda w: {name: w[name] for name in w if name.startswith("vision")}))
        ),
        ValueError,
        "are missing or have another size",
        "'logit_scale'",
        "config.json and weights together",
    ),
    "weights-are-of-another-size": case(
        lambda b: load_model(folder(b, lambda f: save_file(larger().state_dict(), f / WEIGHTS, {"format": "pt"}))),
        ValueError,
        "do not match its config.json",
        "vision_model.embeddings.class_embedding",
    ),
    "another-architecture": case(
        lambda b: load_model(
            saved(b, BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
        ),
        TypeError,
        "is a 'bert' model",
        "openai/clip-vit-base-patch32",
    ),
    "vision-tower-alone": case(
        lambda b: load_any(saved(b, CLIPVisionModelWithProjection(tiny_config().vision_config))),
        TypeError,
        "'clip_vision_model'",
        "an image and a text tower",
    ),
    "no-model": case(lambda b: b.trainer(model=5), TypeError, "model must be a transformers.CLIPModel", "got int"),
    "reference-is-a-name": case(lambda b: b.trainer(ref_model="openai/clip"), TypeError, "ref_model", "got str"),
    "adapters-of-nothing": case(
        lambda b: b.trainer(peft_config=lora(target_modules=["nothing"])), ValueError, "peft_config", "{'nothing'}"
    ),
    "adapters-are-a-dict": case(
        lambda b: b.trainer(peft_config={"r": 2}), TypeError, "peft_config must be a PeftConfig", "{'r': 2}"
    ),
    "adapters-of-a-language-model": case(
        lambda b: b.trainer(peft_config=lora(task_type="CAUSAL_LM")), ValueError, "'CAUSAL_LM'", "task_type=None"
    ),
    "adapters-of-another-model": case(
        lambda b: load_any(adapters(b, larger(), str(b.clip))),
        ValueError,
        "adapters' do not fit their base model",
        "size mismatch",
        "base_model_name_or_path",
    ),
    "adapters-of-a-deeper-model": case(
        lambda b: load_any(adapters(b, CLIPModel(tiny_config(vision={"num_hidden_layers": 3})), str(b.clip))),
        ValueError,
        "belong to another model",
        "layers.2",
        "absent here",
        "base_model_name_or_path",
    ),
    "adapters-without-a-base": case(lambda b: load_any(adapters(b)), ValueError, "name None as their base", "Hub id"),
    "adapters-of-a-lost-base": case(
        lambda b: load_any(adapters(b, base=str(b.folder / "gone"))),
        ValueError,
        "gone' as their base",
        "does not exist",
    ),
    "adapters-are-cut": case(
        lambda b: load_any(adapters(b, None, str(b.clip), lambda f: (f / ADAPTERS).write_bytes(b"cut"))),
        ValueError,
        "do not fit",
        "save them again",
    ),
    "adapters-with-a-broken-config": case(
        lambda b: load_any(adapters(b, change=lambda f: (f / "adapter_config.json").write_text("{"))),
        ValueError,
        "adapter_config.json of",
        "is not readable",
    ),
    "interpolation-with-another": case(
        lambda b: interpolate(b.model, larger(), 0.5), ValueError, "different architectures", "trained from"
    ),
}

PROCESSORS = {
    "of-another-size": case(
        lambda b: b.trainer(processing_class=tiny_processor(48)), ValueError, "images of 48 pixels", "reads 32"
    ),
    "of-another-size-in-evaluation": case(
        lambda b: zero_shot(b, processor=tiny_processor(48)), ValueError, "images of 48 pixels", "same checkpoint"
    ),
    "of-another-vocabulary": case(
        lambda b: b.trainer(processing_class=more_tokens()), ValueError, "has 74 tokens", "only 64"
    ),
    "of-another-vocabulary-in-evaluation": case(
        lambda b: zero_shot(b, processor=more_tokens()), ValueError, "has 74 tokens", "same checkpoint"
    ),
    "a-tokenizer-alone": case(
        lambda b: zero_shot(b, processor=b.processor.tokenizer),
        TypeError,
        "must be a processor",
        "AutoProcessor.from_pretrained",
    ),
}

EMBEDDINGS = {
    "images-of-a-spoiled-model": case(
        lambda b: zero_shot(b, model=spoiled(b)), ValueError, "logits of the model contain nan", "earlier checkpoint"
    ),
    "texts-of-a-spoiled-model": case(
        lambda b: encode_texts(spoiled(b, "text_projection"), b.processor, PROMPTS),
        ValueError,
        "4 of 4 texts, such as 'a photo of a cat'",
        "earlier checkpoint",
    ),
    "retrieval-by-a-spoiled-model": case(lambda b: retrieval(b, spoiled(b)), ValueError, "row 0", "nan or infinity"),
    "classes-of-another-size": case(
        lambda b: classify(b.model, torch.zeros(1, 3, 32, 32), torch.ones(4, 8)), ValueError, "8 dimensions", "16"
    ),
    "classes-are-nan": case(
        lambda b: classify(b.model, torch.zeros(1, 3, 32, 32), torch.full((4, 16), NAN)), ValueError, "text_embeds"
    ),
    "of-two-models": case(
        lambda b: candidate_logps(torch.ones(2, 16), torch.ones(3, 8), 1.0),
        ValueError,
        "16 dimensions",
        "8",
        "same model",
    ),
    "transformation-of-another-size": case(lambda b: ConceptTransform(8).fold_into(b.model), ValueError, "8", "16"),
    "transformation-to-be-trained": case(
        lambda b: b.trainer(concept=ConceptTransform(8)),
        ValueError,
        "embeddings of 8 dimensions",
        "ConceptTransform(16)",
    ),
    "cache-is-a-file": case(
        lambda b: EmbeddingCache(b.clip / "config.json"), OSError, "embeddings_cache", "config.json'", "another folder"
    ),
    "rejected-of-another-shape": case(
        lambda b: preference_loss(PreferenceLogps(*[torch.zeros(3)] * 4), ["sigmoid"], [1.0], LossSettings()),
        ValueError,
        "rejected must be Tensor[B, R]",
        "unsqueeze(-1)",
    ),
    "loss-without-a-weight": case(
        lambda b: preference_loss(PreferenceLogps(*[torch.zeros(3)] * 4), ["sigmoid", "sft"], [1.0], LossSettings()),
        ValueError,
        "['sigmoid', 'sft']",
        "[1.0]",
    ),
}

CASES = {
    f"{table}-{name}": found
    for table, cases in {"model": MODELS, "processor": PROCESSORS, "embeddings": EMBEDDINGS}.items()
    for name, found in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_belong_together_is_refused(name, bench):
    check(CASES[name], bench)


@pytest.mark.parametrize(
    "embeds",
    [torch.full((4, 16), NAN), torch.zeros(3, 16), torch.zeros(4, 8), torch.zeros(4)],
    ids=["nan", "too-few", "of-another-size", "flat"],
)
def test_a_cache_that_holds_something_else_counts_as_absent(embeds, tmp_path):
    cache = EmbeddingCache(tmp_path)
    cache.put("name", embeds)
    assert cache.get("name", 4, 16) is None
    cache.put("name", torch.ones(4, 16))
    assert cache.get("name", 4, 16).shape == (4, 16)


def test_a_spoiled_cache_is_computed_anew_in_training(bench):
    settings = {"embeddings_cache": str(bench.folder / "cache"), "precompute_ref_log_probs": True}
    first = bench.trainer(**settings)
    first.train()
    for file in (bench.folder / "cache").glob("*.safetensors"):
        save_file({name: value * NAN for name, value in load_file(file).items()}, file)
    again = bench.trainer(**settings)
    again.train()
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (first, again)]
    assert losses[0] == losses[1]


def test_a_path_is_as_good_as_a_name(bench):
    assert isinstance(bench.trainer(model=bench.clip).model, CLIPModel)
