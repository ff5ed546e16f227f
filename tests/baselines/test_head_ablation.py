import copy

import pytest
import torch
from PIL import Image
from samples import CLASSES, make_labelled
from transformers import CLIPModel

from clip_po.baselines.head_ablation import ablate_reading_heads, reading_scores, silence_class_token, silence_heads
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.encoding import encode_images
from clip_po.evaluation.robustness import RobustnessImages

TEMPLATES = ["a photo of a {}"]
WIDTH = 16  # Of a head: the hidden size of 32 has two heads.


@pytest.fixture(scope="module")
def images(processor):
    attack = TypographicAttack(words=CLASSES, size=(0.3, 0.4), min_side=32)
    return RobustnessImages(make_labelled(12), attack, processor)


@pytest.fixture(scope="module")
def pixels(images):
    return torch.stack([images[index]["typographic"] for index in range(4)])


def embed(model, pixels):
    with torch.no_grad():
        return encode_images(model.eval(), pixels)


def hooked(model, layer, head, tokens):
    """Return the model with the contribution of a head to some tokens subtracted from the output of the attention."""
    model = copy.deepcopy(model)
    projection = model.vision_model.encoder.layers[layer].self_attn.out_proj
    columns = slice(head * WIDTH, (head + 1) * WIDTH)

    def subtract(module, inputs, output):
        part = inputs[0][..., columns] @ module.weight[:, columns].T
        output[:, tokens] -= part[:, tokens]
        return output

    projection.register_forward_hook(subtract)
    return model


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize(("silence", "tokens"), [(silence_heads, slice(None)), (silence_class_token, slice(0, 1))])
def test_only_the_silenced_head_is_missing(model, pixels, layer, head, silence, tokens):
    before = copy.deepcopy(model.state_dict())
    got = embed(silence(model, [(layer, head)]), pixels)
    torch.testing.assert_close(got, embed(hooked(model, layer, head, tokens), pixels))
    assert not torch.allclose(got, embed(model, pixels), atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_two_ways_agree_in_the_last_layer_only(model, pixels):
    for layer, same in ((1, True), (0, False)):
        first, second = (embed(way(model, [(layer, 1)]), pixels) for way in (silence_heads, silence_class_token))
        assert torch.allclose(first, second, atol=1e-6) == same


def test_silenced_weights_load_with_transformers(model, pixels, tmp_path):
    silenced = silence_heads(model, [(0, 1), (1, 0)])
    silenced.save_pretrained(tmp_path)
    assert torch.equal(embed(CLIPModel.from_pretrained(tmp_path), pixels), embed(silenced, pixels))


def test_an_unknown_head_is_refused(model):
    with pytest.raises(ValueError, match=r"\(2, 0\) is not a head of a vision tower with 2 layers of 2 heads"):
        silence_heads(model, [(2, 0)])
    with pytest.raises(ValueError, match=r"\(0, -1\) is not a head"):
        silence_class_token(model, [(0, -1)])


def look_at_bright_patches(model, head):
    """Make a head of the first layer attend to the brightest patches, and every other head to all patches equally."""
    embeddings, attention = model.vision_model.embeddings, model.vision_model.encoder.layers[0].self_attn
    rows = slice(head * WIDTH, (head + 1) * WIDTH)
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
        embeddings.patch_embedding.weight.zero_()
        # The first number of a patch is its brightness, as a ramp from -1 to 1 after the norms.
        embeddings.patch_embedding.weight[0] = 0.01
        embeddings.class_embedding.zero_()
        for part in (attention.q_proj, attention.k_proj):
            part.weight.zero_()
            part.bias.zero_()
        attention.q_proj.bias[rows] = 1
        attention.k_proj.weight[rows, 0] = 1
    return model


@pytest.mark.parametrize("head", [0, 1])
def test_a_head_that_looks_at_the_words_scores_high(model, processor, head):
    black = make_labelled(12).map(lambda row: {"image": Image.new("RGB", (32, 32))})
    attack = TypographicAttack(
        words=CLASSES, size=(0.3, 0.3), sticker=1.0, sticker_colours=["white"], places=["top"], min_side=32
    )
    images = RobustnessImages(black, attack, processor)
    scores = reading_scores(look_at_bright_patches(model, head), images)
    assert scores.shape == (2, 2)
    # The word is in the upper half, so the highest possible score is about 2.
    assert scores[0, head] > 1.7
    # The other head attends to all patches equally, which scores 1 by definition.
    assert scores[0, 1 - head] == pytest.approx(1, abs=1e-4)


def test_scores_do_not_change_the_model(model, images, pixels):
    model.train()
    reading_scores(model, images, max_items=2)
    assert model.training
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_scores_need_a_visible_word(model, images):
    blind = copy.copy(images)
    blind.attack = TypographicAttack(words=CLASSES, opacity=(1e-6, 1e-6), sticker=0.0, min_side=32)
    with pytest.raises(ValueError, match="No word is visible on any image"):
        reading_scores(model, blind, max_items=3)


def test_heads_stay_silenced_if_they_help_within_the_bound(model, images):
    found = ablate_reading_heads(model, images, TEMPLATES, max_clean_loss=10.0, first_layer=0)
    base, *trials = found.trials
    assert (base.head, base.kept) == (None, False)
    scores = reading_scores(model, images)
    assert [trial.score for trial in trials] == sorted(scores.flatten().tolist(), reverse=True)
    assert found.heads == [trial.head for trial in trials if trial.kept]
    best = base.typographic_accuracy
    for trial in trials:
        fits = trial.typographic_accuracy > best and base.clean_accuracy - trial.clean_accuracy <= 0.1 + 1e-9
        assert trial.kept == fits
        best = trial.typographic_accuracy if trial.kept else best


def test_the_ablated_model_has_the_kept_heads_silenced(model, images, pixels):
    found = ablate_reading_heads(model, images, TEMPLATES, 100.0, silence=silence_heads, first_layer=0)
    assert torch.equal(embed(found.model, pixels), embed(silence_heads(model, found.heads), pixels))


def test_the_search_ends(model, images):
    tried = {
        name: len(ablate_reading_heads(model, images, TEMPLATES, **arguments).trials) - 1
        for name, arguments in {
            "later half": {"min_gain": 101.0},
            "patience": {"min_gain": 101.0, "first_layer": 0, "patience": 3},
            "max_heads": {"max_heads": 0},
        }.items()
    }
    assert tried == {"later half": 2, "patience": 3, "max_heads": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_clean_loss": -1.0}, "max_clean_loss must be a loss"),
        ({"patience": 0}, "patience must be a whole number >= 1"),
        ({"first_layer": 2}, "first_layer must be a layer"),
        ({"max_items": 0}, "There are no items to score"),
    ],
)
def test_arguments_out_of_range_are_refused(model, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        ablate_reading_heads(model, images, TEMPLATES, **arguments)


def test_adapters_have_to_be_merged_first(model, images):
    with pytest.raises(TypeError, match="Merge adapters first"):
        silence_heads(torch.nn.Sequential(model), [(0, 0)])
