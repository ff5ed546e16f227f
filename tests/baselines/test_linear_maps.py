"""The closed forms on embeddings, each against another computation of the same thing."""

import math

import numpy as np
import pytest
import torch
from samples import CLASSES
from torch.nn import functional as F

from clip_po.baselines import (
    drop_informative_features,
    mutual_information,
    project_out_attribute,
    project_out_biased_prompts,
    project_out_directions,
)
from clip_po.encoding import encode_texts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def residual(embeds, directions):
    """Return embeddings less their least-squares fit by the directions, number by number."""
    wide, basis = embeds.double().T.numpy(), directions.double().T.numpy()
    fit, *_ = np.linalg.lstsq(basis, wide, rcond=None)
    return torch.from_numpy((wide - basis @ fit).T).float()


def test_orthogonal_projection_leaves_the_least_squares_residual_of_both_towers():
    directions, images, texts = random(3, 8), unit(5, 8, seed=1), unit(4, 8, seed=2)
    projected = project_out_directions(directions)(images, texts)
    for found, embeds in zip(projected, (images, texts), strict=True):
        torch.testing.assert_close(found, F.normalize(residual(embeds, directions), dim=-1))


def test_directions_that_depend_on_each_other_count_once():
    directions = random(2, 8)
    more = torch.cat([directions, 3 * directions, directions.sum(0, keepdim=True)])
    torch.testing.assert_close(
        project_out_directions(more).image_weight, project_out_directions(directions).image_weight
    )


@pytest.mark.parametrize("directions", [torch.zeros(2, 4), torch.eye(4), torch.full((1, 4), torch.nan), torch.ones(4)])
def test_directions_that_leave_or_remove_nothing_are_refused(directions):
    with pytest.raises(ValueError, match="directions"):
        project_out_directions(directions)


def test_the_calibrated_projection_minimizes_its_loss():
    """It is P0 times the matrix where the gradient of |P - I|^2 + lambda / S sum |P (z_i - z_j)|^2 is zero."""
    directions, first, second, calibration = random(2, 6), unit(4, 6, seed=1), unit(4, 6, seed=2), 7.0
    concept = project_out_biased_prompts(directions, first, second, calibration)
    free = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        apart = (first - second).double() @ free.T
        total = (free - torch.eye(6)).square().sum() + calibration / 4 * apart.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    expected = residual(free.detach().T.float(), directions).T
    torch.testing.assert_close(concept.text_weight, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(concept.image_weight, torch.eye(6))


def test_calibration_draws_the_prompts_of_a_pair_together():
    directions, first, second = random(1, 16), unit(3, 16, seed=1), unit(3, 16, seed=2)
    cosines = []
    for calibration in (0.0, 10.0, 1000.0):
        concept = project_out_biased_prompts(directions, first, second, calibration)
        one, other = (concept(first, texts)[1] for texts in (first, second))
        cosines.append((one * other).sum(dim=1).mean().item())
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.99
    torch.testing.assert_close(
        project_out_biased_prompts(directions, first, second, 0).text_weight,
        project_out_directions(directions).image_weight,
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((unit(2, 4), unit(3, 4)), "pair"),
        ((unit(0, 4), unit(0, 4)), "pair"),
        ((unit(2, 4), unit(2, 4, seed=1), -1.0), "calibration"),
    ],
)
def test_pairs_that_do_not_match_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        project_out_biased_prompts(unit(1, 4), *arguments)


def test_without_their_subspace_all_groups_have_one_mean():
    groups = np.array(["a", "b", "c", "a", "b"] * 20)
    images = random(100, 8)
    for number, name in enumerate("abc"):
        images[groups == name] += 3 * random(8, seed=number + 1)
    moved = images @ project_out_attribute(images, groups).image_weight.T
    means = [moved[groups == name].mean(dim=0) for name in "abc"]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(project_out_attribute(images, groups).image_weight) == 6


def test_the_subspace_of_two_groups_is_the_difference_of_their_means():
    groups, images = [0, 1, 1, 0, 1] * 8, random(40, 8)
    number = torch.tensor(groups)
    difference = images[number == 0].mean(dim=0) - images[number == 1].mean(dim=0)
    torch.testing.assert_close(
        project_out_attribute(images, groups).image_weight, project_out_directions(difference[None]).image_weight
    )


def test_fewer_dimensions_are_those_of_the_largest_covariance():
    groups = np.arange(90) % 3
    images = torch.zeros(90, 4)
    images[:, 0] = torch.from_numpy(np.where(groups == 0, 5.0, 0.0))
    images[:, 1] = torch.from_numpy(np.where(groups == 1, 1.0, 0.0))
    weight = project_out_attribute(images, groups, dimensions=1).image_weight
    assert weight[0, 0] < 0.02
    assert weight[1, 1] > 0.98


@pytest.mark.parametrize(
    ("groups", "dimensions"), [([0, 0, 0, 0], None), ([0, 1], None), ([0, 1, 0, 1], 2), ([0, 1, 0, 1], 0)]
)
def test_groups_without_such_a_subspace_are_refused(groups, dimensions):
    with pytest.raises(ValueError, match="group"):
        project_out_attribute(unit(4, 8), groups, dimensions)


def by_hand(values, groups, bins):
    """Return the mutual information of one number with the group, from sets of ranks."""
    images = len(values)
    order = sorted(range(images), key=lambda image: values[image])
    bin_of = {image: rank * bins // images for rank, image in enumerate(order)}
    total = 0.0
    for number in range(bins):
        for group in set(groups):
            both = sum(bin_of[image] == number and groups[image] == group for image in range(images))
            if both:
                alone = sum(bin_of[image] == number for image in range(images)) * groups.count(group)
                total += both / images * math.log(both * images / alone)
    return total


def test_mutual_information_is_the_sum_over_bins_and_groups():
    images, groups = random(50, 3), [int(value) % 3 for value in torch.randint(9, (50,)).tolist()]
    expected = [by_hand(images[:, column].tolist(), groups, 4) for column in range(3)]
    np.testing.assert_allclose(mutual_information(images, groups, bins=4), expected)


def test_a_number_that_tells_the_group_has_its_entropy():
    groups = np.arange(100) % 2
    images = torch.stack([torch.from_numpy(groups * 1.0), torch.arange(100) / 100], dim=1)
    found = mutual_information(images, groups, bins=10)
    np.testing.assert_allclose(found, [math.log(2), 0], atol=1e-9)


def test_clipping_drops_the_numbers_that_tell_the_group(model, processor):
    images = random(200, 16)
    groups = (images[:, 3] + images[:, 11] > 0).numpy()
    concept = drop_informative_features(images, groups, dropped=2)
    kept = [column for column in range(16) if column not in (3, 11)]
    assert torch.equal(concept.image_weight, torch.eye(16)[kept])

    texts = encode_texts(model, processor, CLASSES)
    folded = encode_texts(concept.fold_into(model), processor, CLASSES)
    torch.testing.assert_close(folded, F.normalize(texts[:, kept], dim=-1))


@pytest.mark.parametrize("dropped", [-1, 16])
def test_a_number_of_features_out_of_range_is_refused(dropped):
    with pytest.raises(ValueError, match="dropped"):
        drop_informative_features(random(40, 16), [0, 1] * 20, dropped)
