"""Texts that the model can't tell apart, texts that are cut, and tokenizers that don't fit: never silent."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from samples import CLASSES, PROMPTS, make_labelled, make_trainer, picture, tiny_config, tiny_processor
from transformers import CLIPModel

from clip_po.candidates import in_batch_candidates
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.encoding import encode_texts
from clip_po.evaluation.retrieval import evaluate_retrieval
from clip_po.evaluation.zero_shot import class_embeddings
from clip_po.families import HIGHEST_ID
from clip_po.text_identity import TextTokens

LONG = "a" + " a" * 31  # as many tokens as the tiny model reads, and more
ALIKE = {
    "case": ("a photo of a Cat", "a photo of a cat"),
    "spaces": ("a  photo of a cat", " a photo of a\tcat "),
    "after-the-last-token": (f"{LONG} cat", f"{LONG} dog"),
    "after-an-end-of-text": ("a cat<|endoftext|> on a mat", "a cat<|endoftext|> in a hat"),
    "unknown-characters": ("a cat 1", "a cat 2"),  # the tokenizer's token for unknown characters ends the text
    "composed-letters": ("a cafe\u0301 dog", "a caf\u00e9 cat"),
}


def rows(count=4, **columns):
    kinds = {"chosen": Value("string"), "rejected": Value("string"), "candidates": List(Value("string"))}
    if isinstance(columns.get("rejected", ("",))[0], list):
        kinds["rejected"] = List(Value("string"))
    features = {"image": Image(), "clean_image": Image(), **{name: kinds[name] for name in columns}}
    images = [picture(i) for i in range(count)]
    return Dataset.from_dict({"image": images, "clean_image": images, **columns}, features=Features(features))


@pytest.fixture
def tokens(model, processor):
    return TextTokens.of(processor, model)


@pytest.mark.parametrize("kind", ALIKE)
def test_texts_are_alike_exactly_where_the_model_gives_them_one_embedding(kind, tokens, model, processor):
    first, second = encode_texts(model, processor, ALIKE[kind])
    assert torch.equal(first, second)
    assert tokens(ALIKE[kind][0]) == tokens(ALIKE[kind][1])
    cat, dog = encode_texts(model, processor, PROMPTS[:2])
    assert not torch.allclose(cat, dog)
    assert tokens(PROMPTS[0]) != tokens(PROMPTS[1])


def test_old_configs_end_a_text_at_its_highest_token(tokens, processor):
    old = TextTokens(processor.tokenizer, 32, HIGHEST_ID)
    assert old("az b") == old("az c") != old("ab z")


def chosen_and_rejected(first, second):
    return {"train_dataset": rows(chosen=["a dog"] * 3 + [first], rejected=["a cat"] * 3 + [second])}


def several_rejected(first, second):
    return {"train_dataset": rows(chosen=["a dog"] * 4, rejected=[["a cat"]] * 3 + [[first, second]])}


def own_candidates(first, second):
    own = [["a dog", "a cat"]] * 3 + [["a dog", "a cat", first, second]]
    return {"train_dataset": rows(chosen=["a dog"] * 4, rejected=["a cat"] * 4, candidates=own)}


def evaluation(first, second):
    return {"eval_dataset": {"far": chosen_and_rejected(first, second)["train_dataset"]}}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("place", [chosen_and_rejected, several_rejected, own_candidates, evaluation])
def test_a_row_whose_texts_are_alike_is_refused(place, kind, clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"row 3: .*can't tell them apart.*drop the row"):
        make_trainer(clip_folder, tmp_path, candidate_texts=None, **place(*ALIKE[kind]))


@pytest.mark.parametrize("kind", ALIKE)
def test_candidates_that_are_alike_are_refused(kind, clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"candidate_texts: .*can't tell them apart"):
        make_trainer(clip_folder, tmp_path, candidate_texts=[*PROMPTS[1:], *ALIKE[kind]])


def test_a_streamed_row_whose_texts_are_alike_is_refused_as_it_comes(clip_folder, tmp_path):
    stream = chosen_and_rejected("Seven", "seven")["train_dataset"].to_iterable_dataset()
    trainer = make_trainer(clip_folder, tmp_path, train_dataset=stream, candidate_texts=None, max_steps=1)
    with pytest.raises(ValueError, match=r"row 3 of the stream: .*can't tell them apart"):
        trainer.train()


@pytest.mark.parametrize("kind", ["numbered", "streamed"])
def test_class_names_whose_prompts_are_alike_are_refused(kind, clip_folder, tmp_path):
    attack = TypographicAttack(words=["one", "two", "three", "four"], min_side=32)
    names, template = ["a", "b", "c", "d"], f"{LONG} {{}}"
    labelled = make_labelled(4)
    if kind == "numbered":
        dataset = TypographicPreferences(labelled, attack, names, template)
    else:
        dataset = TypographicStream(labelled.to_iterable_dataset(), attack, names, template)
    with pytest.raises(ValueError, match="can't tell them apart"):
        make_trainer(clip_folder, tmp_path, train_dataset=dataset, candidate_texts=None, max_steps=1)


def test_texts_of_a_batch_that_are_alike_are_one_candidate(tokens, processor, labelled):
    image = labelled[0]["image"]
    texts = [("a cat", "a dog"), ("A  Cat", "a bird")]
    batch = DataCollatorForContrastivePreference(processor)(
        [{"image": image, "chosen": c, "rejected": [r], "weight": 1.0, "reg_row_weight": 0.0} for c, r in texts]
    )
    found = in_batch_candidates(batch, tokens)
    assert found["texts"] == ["a cat", "a dog", "a bird"]
    assert found["chosen"].tolist() == [0, 0]
    assert found["rejected"].tolist() == [[1], [2]]


def test_in_batch_candidates_of_a_trainer_are_told_apart_by_tokens(clip_folder, tmp_path):
    data = rows(chosen=["a cat", "A cat", "a  cat", "a CAT"], rejected=["a dog"] * 4)
    trainer = make_trainer(
        clip_folder, tmp_path, train_dataset=data, candidate_texts=None, in_batch_candidates=True, max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["logps"].shape == (4, 2)


# ---- Texts that are cut


@pytest.mark.parametrize("where", ["rows", "candidates", "classes"])
def test_cut_texts_are_counted_and_said_once(where, clip_folder, tmp_path, caplog):
    long = [f"{letter} {LONG}" for letter in "bcd"]
    if where == "rows":
        arguments = {"train_dataset": rows(chosen=[*long, long[0]], rejected=["a dog"] * 4), "candidate_texts": None}
    elif where == "candidates":
        arguments = {"candidate_texts": [*PROMPTS, *long]}
    else:
        attack = TypographicAttack(words=CLASSES, min_side=32)
        dataset = TypographicPreferences(make_labelled(4), attack, template=f"{{}} {LONG}")
        arguments = {"train_dataset": dataset, "candidate_texts": dataset.candidate_texts}
    make_trainer(clip_folder, tmp_path, **arguments)
    said = [record.message for record in caplog.records if "tokens that the model reads" in record.message]
    count, name = {"rows": (3, "train_dataset"), "candidates": (3, "candidate_texts")}.get(
        where, (4, "candidate_texts")
    )
    assert len(said) == 1
    assert said[0].startswith(f"{count} texts of {name}")


# ---- Tokenizers


def ends_elsewhere():
    config = tiny_config()
    config.text_config.eos_token_id = 60
    return CLIPModel(config), tiny_processor()


def old_config_with_a_low_end():
    config = tiny_config()
    config.text_config.eos_token_id = 2  # the highest id of "a photo" is not the end
    return CLIPModel(config), tiny_processor()


def pads_left():
    processor = tiny_processor()
    processor.tokenizer.padding_side = "left"
    return CLIPModel(tiny_config()), processor


TOKENIZERS = {
    "end-of-text-never-occurs": (ends_elsewhere, "end-of-text token of the model is 60.*eos_token_id"),
    "old-config": (old_config_with_a_low_end, "end-of-text token of the model is 2"),
    "padding-on-the-left": (pads_left, "padding_side = 'right'"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("use", ["training", "evaluation", "retrieval", "plain-embeddings"])
def test_a_tokenizer_that_gives_texts_no_embedding_of_their_own_is_refused(use, name, tmp_path, labelled):
    make, says = TOKENIZERS[name]
    model, processor = make()
    calls = {
        "training": lambda: make_trainer(model, tmp_path, processing_class=processor),
        "evaluation": lambda: class_embeddings(model, processor, CLASSES, ["a photo of a {}"]),
        "retrieval": lambda: evaluate_retrieval(
            {"model": model}, processor, labelled.add_column("caption", ["a cat"] * len(labelled))
        ),
        "plain-embeddings": lambda: encode_texts(model, processor, ["a cat"]),
    }
    with pytest.raises(ValueError, match=says):
        calls[use]()
