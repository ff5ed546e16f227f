import math

import pytest
import torch
from samples import CLASSES, PROMPTS, make_labelled
from torch.nn import functional as F

from clip_po.baselines.spelling_projection import contrastive_loss, learn_spelling_projection
from clip_po.concept import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.images import to_pixels
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images, encode_texts

ROWS = 12


@pytest.fixture(scope="module")
def preferences():
    return TypographicPreferences(make_labelled(ROWS), TypographicAttack(words=CLASSES, min_side=32))


def learn(model, processor, preferences, **arguments):
    return learn_spelling_projection(model, processor, preferences, disable_tqdm=True, **arguments)


def embeddings(model, processor, preferences, epoch=0):
    """Return the embeddings of clean images, typographic images and class prompts."""
    rows = [preferences.row(index, epoch) for index in range(ROWS)]
    with torch.no_grad():
        clean, typographic = (
            encode_images(model.eval(), to_pixels(processor, [row[name] for row in rows]))
            for name in ("clean_image", "image")
        )
    return clean, typographic, encode_texts(model, processor, PROMPTS)[preferences.labels]


def by_hand(first, second, group):
    """Return the symmetric cross-entropy, pair by pair."""
    total = 0.0
    for one, other in ((first, second), (second, first)):
        for row in range(len(group)):
            cosines = [one[row] @ other[column] for column in range(len(group))]
            pairs = [column for column in range(len(group)) if group[column] == group[row]]
            whole = torch.stack(cosines).exp().sum().log()
            total += sum(whole - cosines[column] for column in pairs) / len(pairs) / (2 * len(group))
    return total


def loss_by_hand(weight, clean, typographic, texts, labels, penalty_weight):
    shown, attacked, told = (F.normalize(embeds @ weight.T, dim=-1) for embeds in (clean, typographic, texts))
    distance = (torch.eye(len(weight)) - weight @ weight.T).pow(2).sum().sqrt()
    contrasts = by_hand(shown, told, labels) + by_hand(attacked, told, labels)
    return contrasts + by_hand(attacked, shown, list(range(ROWS))) + penalty_weight * distance


@pytest.mark.parametrize("group", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0]])
def test_the_loss_is_the_mean_over_rows_and_directions(group):
    first, second = F.normalize(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(contrastive_loss(first, second, torch.tensor(group)), by_hand(first, second, group))


def test_pairs_that_agree_have_the_lowest_loss():
    apart, group = torch.eye(3), torch.arange(3)
    best = math.log(1 + 2 / math.e)
    assert contrastive_loss(apart, apart, group).item() == pytest.approx(best)
    assert contrastive_loss(apart, apart.roll(1, 0), group).item() > best


def test_one_step_goes_against_the_gradient_of_the_loss(model, processor, preferences):
    """The first step of Adam moves each number by the learning rate, against the sign of its gradient."""
    start = learn(model, processor, preferences, steps=0, output_dim=4, seed=3).image_weight
    assert torch.equal(start, ConceptTransform(16, 4, start="orthogonal", seed=3).image_weight)
    after = learn(model, processor, preferences, steps=1, output_dim=4, seed=3, learning_rate=0.01, penalty_weight=0.0)
    weight = start.clone().requires_grad_()
    loss_by_hand(weight, *embeddings(model, processor, preferences), preferences.labels, 0.0).backward()
    torch.testing.assert_close(after.image_weight, start - 0.01 * weight.grad.sign(), atol=1e-5, rtol=0)


def test_training_lowers_the_loss_and_the_penalty_keeps_the_rows_orthonormal(model, processor, preferences):
    parts = embeddings(model, processor, preferences)

    def loss(projection):
        return loss_by_hand(projection.image_weight, *parts, preferences.labels, 0.0).item()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    start, bound, free = (
        learn(model, processor, preferences, steps=steps, learning_rate=0.005, penalty_weight=weight)
        for steps, weight in ((0, 0.5), (150, 0.5), (150, 0.0))
    )
    assert start.output_dim == 8
    assert loss(free) < loss(start) - 0.05
    assert loss(bound) < loss(start) - 0.02
    assert bound.penalty() < 0.1 < free.penalty()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_drawing_is_trained_on(model, processor, preferences):
    one, two = (learn(model, processor, preferences, steps=2, drawings=drawings) for drawings in (1, 2))
    assert not torch.equal(one.image_weight, two.image_weight)
    first = learn(model, processor, preferences, steps=1, drawings=2)
    assert torch.equal(first.image_weight, learn(model, processor, preferences, steps=1).image_weight)


def test_the_folded_model_compares_projected_embeddings(model, processor, preferences):
    projection = learn(model, processor, preferences, steps=3, learning_rate=0.01)
    clean, _, texts = embeddings(model, processor, preferences)
    got = embeddings(projection.fold_into(model), processor, preferences)
    weight = projection.image_weight
    for found, plain in ((got[0], clean), (got[2], texts)):
        torch.testing.assert_close(found, F.normalize(plain @ weight.T, dim=-1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": -1}, "steps"),
        ({"drawings": 0}, "drawings"),
        ({"batch_size": 0}, "batch_size"),
        ({"penalty_weight": -0.5}, "penalty_weight"),
        ({"output_dim": 17}, "output_dim must be between 1 and dim=16"),
    ],
)
def test_numbers_out_of_range_are_refused(model, processor, preferences, arguments, said):
    with pytest.raises(ValueError, match=said):
        learn(model, processor, preferences, **arguments)
