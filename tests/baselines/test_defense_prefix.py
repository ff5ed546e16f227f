import copy

import pytest
import torch
from samples import CLASSES, make_labelled
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from clip_po.baselines.defense_prefix import Prefix, learn_prefix, prefix_class_embeddings
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import evaluating
from clip_po.evaluation.zero_shot import class_embeddings, classify

TEMPLATES = ["a photo of a {}", "a {} in a box"]


@pytest.fixture(scope="module")
def preferences():
    attack = TypographicAttack(words=CLASSES, min_side=32, redraw="never")
    return TypographicPreferences(make_labelled(12), attack)


def learn(model, processor, preferences, **arguments):
    arguments = {"steps": 5, "batch_size": 8, "learning_rate": 0.1, **arguments}
    return learn_prefix(model, processor, preferences, disable_tqdm=True, **arguments)


def losses(model, processor, preferences, prefix, templates=TEMPLATES[:1]):
    """Return the cross-entropy of typographic images, and the KL of clean images from plain prompts."""
    rows = [preferences[index] for index in range(len(preferences))]
    with evaluating(model):
        embeds = prefix_class_embeddings(model, processor, prefix, CLASSES, templates)
        plain = class_embeddings(model, processor, CLASSES, templates)
        attacked, clean = (to_pixels(processor, [row[name] for row in rows]) for name in ("image", "clean_image"))
        defense = F.cross_entropy(classify(model, attacked, embeds), torch.tensor(preferences.labels))
        logps = (classify(model, clean, texts).log_softmax(-1) for texts in (embeds, plain))
        identity = F.kl_div(*logps, log_target=True, reduction="batchmean")
    return defense.item(), identity.item()


def with_highest_end(processor):
    """Return the processor with the two special tokens after all others, as in CLIP's own vocabulary."""
    tokens = sorted(
        processor.tokenizer.get_vocab(), key=lambda token: (token.startswith("<|"), token != "<|startoftext|>")
    )
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    return CLIPProcessor(image_processor=processor.image_processor, tokenizer=tokenizer)


@pytest.mark.parametrize("pooling", ["the end's token", "the highest token"])
def test_the_token_goes_before_the_name(clip_folder, processor, pooling):
    """A token with the embedding of a letter has the effect of that letter in the prompt."""
    config = CLIPConfig.from_pretrained(clip_folder)
    if pooling == "the highest token":
        config.text_config.eos_token_id = 2  # as in OpenAI's configurations, with the end's token at the top
        processor = with_highest_end(processor)
    model = CLIPModel.from_pretrained(clip_folder, config=config)
    letter = processor.tokenizer("x")["input_ids"][1]
    prefix = Prefix(model.text_model.embeddings.token_embedding.weight[letter].detach())
    for template in TEMPLATES:
        got = prefix_class_embeddings(model, processor, prefix, CLASSES, [template])
        written = class_embeddings(model, processor, [f"x {name}" for name in CLASSES], [template])
        torch.testing.assert_close(got, written)
        assert not torch.allclose(got, class_embeddings(model, processor, CLASSES, [template]), atol=1e-3)


def test_embeddings_are_the_mean_over_templates(model, processor, preferences):
    prefix = learn(model, processor, preferences, steps=0)
    each = [prefix_class_embeddings(model, processor, prefix, CLASSES, [template]) for template in TEMPLATES]
    both = prefix_class_embeddings(model, processor, prefix, CLASSES, TEMPLATES)
    torch.testing.assert_close(both, F.normalize(torch.stack(each).mean(0), dim=-1))
    assert not both.requires_grad


def test_training_lowers_the_losses_that_have_weight(model, processor, preferences):
    def after(**arguments):
        prefix = learn(model, processor, preferences, batch_size=12, **arguments)
        return losses(model, processor, preferences, prefix)

    start = after(steps=0)
    assert after(steps=30, identity_weight=0.0)[0] < start[0] - 0.01
    assert after(steps=30, defense_weight=0.0)[1] < 0.9 * start[1]


def test_the_model_is_left_as_it_was(model, processor, preferences):
    before = copy.deepcopy(model.state_dict())
    model.train()
    learn(model, processor, preferences)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.text_model.embeddings.token_embedding._forward_hooks


def test_the_same_seed_gives_the_same_token(model, processor, preferences):
    def vector(**arguments):
        return learn(model, processor, preferences, templates=TEMPLATES, **arguments).vector

    torch.manual_seed(1)
    first = vector()
    torch.manual_seed(2)
    assert torch.equal(vector(), first)
    assert not torch.equal(vector(seed=1), first)


def test_training_cycles_through_the_drawings(model, processor):
    attack = TypographicAttack(words=CLASSES, min_side=32)
    preferences = TypographicPreferences(make_labelled(8), attack)
    one, two = (learn(model, processor, preferences, steps=1, drawings=drawings) for drawings in (1, 2))
    assert torch.equal(one.vector, two.vector)
    one, two = (learn(model, processor, preferences, steps=2, drawings=drawings) for drawings in (1, 2))
    assert not torch.equal(one.vector, two.vector)


def test_a_token_is_saved_and_loaded(model, processor, preferences, tmp_path):
    prefix = learn(model, processor, preferences)
    prefix.save(tmp_path / "prefix.safetensors")
    assert torch.equal(Prefix.load(tmp_path / "prefix.safetensors").vector, prefix.vector)


def test_a_file_with_other_tensors_is_refused(clip_folder):
    with pytest.raises(ValueError, match="expected 'prefix'"):
        Prefix.load(clip_folder / "model.safetensors")


def test_a_token_of_another_model_is_refused(model, processor):
    with pytest.raises(ValueError, match=r"shape \(8,\), but token embeddings of the model have shape \(32,\)"):
        prefix_class_embeddings(model, processor, Prefix(torch.zeros(8)), CLASSES, TEMPLATES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo", "exactly one '{}'.*got 'a photo' with 0"),
        ("a photo of un{}", "does not begin with a token of its own"),
        ("a very long prompt that leaves no room for {}", "does not begin with a token of its own"),
    ],
)
def test_templates_without_a_position_for_the_token_are_refused(model, processor, template, message):
    with pytest.raises(ValueError, match=message):
        prefix_class_embeddings(model, processor, Prefix(torch.zeros(32)), CLASSES, [template])


@pytest.mark.parametrize("arguments", [{"steps": -1}, {"drawings": 0}, {"batch_size": 0}, {"identity_weight": -1.0}])
def test_arguments_out_of_range_are_refused(model, processor, preferences, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        learn(model, processor, preferences, **arguments)
