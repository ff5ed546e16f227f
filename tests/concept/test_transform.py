"""The transformation of frozen embeddings: its penalty, both paths of the scale, files, and folding into a model."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tolerances import rounding
from torch.nn import functional as F
from transformers import CLIPModel

from clip_po.concept.transform import CONCEPT_FILE, ConceptTransform

DIM = 16  # of the tiny CLIP
SCALES = (-2.0, -0.5, 0.0, 0.3, 1.0, 2.0)


def randomized(*args, seed=0, spread=0.1, **kwargs):
    """A transformation that training might have left: near its start, and not on it."""
    transform = ConceptTransform(*args, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in transform.parameters():
            weight.add_(spread * torch.randn(weight.shape, generator=generator))
    return transform


def unit(rows, seed=0):
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosines(transform, images, texts):
    first, second = transform(images, texts)
    return first @ second.T


@pytest.fixture
def embeds():
    return unit(7, seed=1), unit(5, seed=2)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": torch.tensor([[0, 5, 9, 1], [0, 7, 8, 1]])}


@pytest.mark.parametrize("towers", ["shared", "each", "image"])
def test_the_identity_is_the_original_model(towers, embeds):
    images, texts = ConceptTransform(DIM, towers=towers)(*embeds)
    torch.testing.assert_close(images, embeds[0])
    torch.testing.assert_close(texts, embeds[1])


@pytest.mark.parametrize("towers", ["shared", "each"])
def test_an_orthogonal_start_leaves_every_cosine_and_differs_by_seed(towers, embeds):
    start = ConceptTransform(DIM, towers=towers, start="orthogonal", seed=3)
    torch.testing.assert_close(cosines(start, *embeds), embeds[0] @ embeds[1].T, atol=rounding(depth=DIM), rtol=0)
    assert start.penalty() < 1e-5
    again, other = (ConceptTransform(DIM, start="orthogonal", seed=seed).image_weight for seed in (3, 4))
    assert torch.equal(start.image_weight, again)
    assert not torch.allclose(again, other, atol=0.1)


def test_which_side_is_transformed(embeds):
    shared, each, image = (randomized(DIM, towers=towers) for towers in ("shared", "each", "image"))
    for transform, weights in (
        (shared, (shared.image_weight, shared.image_weight)),
        (each, (each.image_weight, each.text_weight)),
        (image, (image.image_weight, torch.eye(DIM))),
    ):
        for found, given, weight in zip(transform(*embeds), embeds, weights, strict=True):
            torch.testing.assert_close(found, F.normalize(given @ weight.T, dim=-1))
    assert [len(list(t.parameters())) for t in (shared, each, image)] == [1, 2, 1]


def test_half_precision_embeddings_are_transformed_in_float32(embeds):
    transform = randomized(DIM)
    with torch.autocast("cpu", torch.bfloat16):
        images, _ = transform(*(e.bfloat16() for e in embeds))
    torch.testing.assert_close(images, F.normalize(embeds[0].bfloat16().float() @ transform.image_weight.T, dim=-1))


def test_the_penalty_is_the_distance_of_w_w_t_from_the_identity_and_trains():
    transform = ConceptTransform(4, 2)
    with torch.no_grad():
        transform.image_weight.copy_(torch.tensor([[2.0, 0, 0, 0], [0, 1, 1, 0]]))
    penalty = transform.penalty()
    assert penalty.item() == pytest.approx(math.hypot(3, 1))  # W W^T = diag(4, 2)
    penalty.backward()
    assert transform.image_weight.grad.abs().max() > 0
    each = ConceptTransform(4, towers="each")
    with torch.no_grad():
        each.image_weight[0, 0], each.text_weight[0, 0] = 2.0, 3.0
    assert each.penalty().item() == pytest.approx(3 + 8)
    start = ConceptTransform(4)
    start.penalty().backward()
    assert start.image_weight.grad.isfinite().all()


@pytest.mark.parametrize("t", SCALES)
def test_the_singular_path_is_the_similarity_of_the_formula(t, embeds):
    transform = randomized(DIM)
    _, s, vh = torch.linalg.svd(transform.image_weight.detach().double())
    metric = vh.T @ torch.diag(s ** (2 * t)) @ vh
    x, y = (e.double() for e in embeds)
    norms = [((e @ metric) * e).sum(dim=-1).sqrt() for e in (x, y)]
    expected = x @ metric @ y.T / norms[0].unsqueeze(-1) / norms[1]
    torch.testing.assert_close(cosines(transform.at(t), *embeds).double(), expected, atol=1e-5, rtol=0)


def test_both_paths_lead_from_the_original_to_the_trained_model(embeds):
    shared, image = randomized(DIM), randomized(DIM, towers="image")
    for transform, path in ((shared, "singular"), (shared, "straight"), (image, "straight")):
        before = copy.deepcopy(transform.state_dict())
        torch.testing.assert_close(cosines(transform.at(0, path), *embeds), embeds[0] @ embeds[1].T)
        torch.testing.assert_close(cosines(transform.at(1, path), *embeds), cosines(transform, *embeds))
        assert all(torch.equal(before[name], value) for name, value in transform.state_dict().items())


@pytest.mark.parametrize("t", SCALES)
def test_the_straight_path_is_linear_for_each_tower(t):
    transform = randomized(DIM, towers="each")
    scaled = transform.at(t, "straight")
    for name, weight in transform.named_parameters():
        torch.testing.assert_close(getattr(scaled, name), (1 - t) * torch.eye(DIM) + t * weight)


def test_scales_multiply_and_can_be_undone(embeds):
    transform = randomized(DIM)
    there_and_back = transform.at(-0.5).at(-2.0)
    torch.testing.assert_close(cosines(there_and_back, *embeds), cosines(transform, *embeds), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("transform", "path", "reason"),
    [
        (ConceptTransform(DIM, towers="each"), "singular", "would differ between the towers.*path='straight'"),
        (ConceptTransform(DIM, towers="image"), "singular", "would differ between the towers.*path='straight'"),
        (ConceptTransform(DIM, 4), "singular", "4 x 16.*would not be the original"),
        (ConceptTransform(DIM, 4), "straight", "4 x 16.*would not be the original"),
        (ConceptTransform(DIM), "curved", "path must be one of"),
    ],
)
def test_scaling_is_refused_where_0_would_not_be_the_original_model(transform, path, reason):
    with pytest.raises(ValueError, match=reason):
        transform.at(0.5, path)


def test_a_direction_that_w_dropped_stays_dropped_and_is_not_divided_by():
    transform = ConceptTransform(DIM)
    with torch.no_grad():
        transform.image_weight[3, 3] = 0.0
    assert transform.at(0.5).image_weight[3, 3].abs() < 1e-6
    torch.testing.assert_close(transform.at(0.0).image_weight, torch.eye(DIM))
    with pytest.raises(ValueError, match="1 singular values of 0"):
        transform.at(-0.5)
    assert transform.at(-0.5, "straight").image_weight[3, 3] == 1.5


@pytest.mark.parametrize("t", [math.nan, math.inf])
def test_a_scale_is_a_finite_number(t):
    with pytest.raises(ValueError, match="t must be a finite number"):
        ConceptTransform(DIM).at(t)


def test_a_diverged_transformation_is_refused():
    transform = ConceptTransform(DIM)
    with torch.no_grad():
        transform.image_weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="its training diverged"):
        transform.at(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_dim": 17}, "between 1 and dim=16"),
        ({"output_dim": 0}, "between 1 and dim=16"),
        ({"towers": "text"}, "towers must be one of"),
        ({"start": "zero"}, "start must be one of"),
        ({"towers": "image", "output_dim": 4}, "towers='image' leaves texts as they are"),
        ({"towers": "image", "start": "orthogonal"}, "towers='image' leaves texts as they are"),
    ],
)
def test_what_makes_no_transformation_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConceptTransform(DIM, **arguments)


@pytest.mark.parametrize(
    "transform",
    [randomized(DIM), randomized(DIM, 4), randomized(DIM, 4, "each"), randomized(DIM, towers="image").half()],
)
def test_a_saved_transformation_comes_back(transform, tmp_path):
    transform.save(tmp_path / "new")
    loaded = ConceptTransform.load(tmp_path / "new")
    assert repr(loaded) == repr(transform)
    assert loaded.state_dict().keys() == transform.state_dict().keys()
    for name, weight in transform.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
        assert loaded.state_dict()[name].dtype == weight.dtype


def test_files_that_hold_no_transformation_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONCEPT_FILE):
        ConceptTransform.load(tmp_path)
    file = tmp_path / CONCEPT_FILE
    file.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="is not a transformation"):
        ConceptTransform.load(tmp_path)
    save_file({"image_weight": torch.eye(4)}, file)
    with pytest.raises(ValueError, match="is not a transformation"):
        ConceptTransform.load(tmp_path)
    save_file({"image_weight": torch.eye(4)}, file, metadata={"dim": "5", "output_dim": "5", "towers": "shared"})
    with pytest.raises(ValueError, match="is not a transformation"):
        ConceptTransform.load(tmp_path)


FOLDED = {
    "shared": (lambda: randomized(DIM), None, "singular"),
    "scaled": (lambda: randomized(DIM), -0.5, "singular"),
    "orthogonal": (lambda: randomized(DIM, start="orthogonal"), 2.0, "singular"),
    "fewer": (lambda: randomized(DIM, 4), None, "singular"),
    "each": (lambda: randomized(DIM, towers="each"), 0.5, "straight"),
    "image": (lambda: randomized(DIM, towers="image"), -1.0, "straight"),
}


@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_a_folded_model_gives_the_transformed_embeddings_also_from_disk(name, model, inputs, tmp_path):
    build, t, path = FOLDED[name]
    transform = build()
    before = copy.deepcopy(model.state_dict())
    original = model(**inputs)
    expected = (transform if t is None else transform.at(t, path))(original.image_embeds, original.text_embeds)
    folded = transform.fold_into(model, t, path)
    folded.save_pretrained(tmp_path)
    for plain in (folded, CLIPModel.from_pretrained(tmp_path)):
        outputs = plain(**inputs)
        torch.testing.assert_close(outputs.image_embeds, expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs.text_embeds, expected[1], atol=1e-5, rtol=0)
        assert plain.config.projection_dim == transform.output_dim
    assert type(folded) is CLIPModel
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.projection_dim == DIM


@torch.no_grad()
def test_adapters_are_merged_and_half_precision_stays(model, inputs):
    lora = LoraConfig(r=2, target_modules=r".*vision_model.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    transform = randomized(DIM)
    original = adapted(**inputs)
    folded = transform.fold_into(adapted)
    assert type(folded) is CLIPModel
    torch.testing.assert_close(
        folded(**inputs).image_embeds, transform(original.image_embeds, original.text_embeds)[0], atol=1e-5, rtol=0
    )
    assert transform.fold_into(model.bfloat16()).dtype == torch.bfloat16


def test_a_fold_that_can_not_be_is_refused(model):
    with pytest.raises(ValueError, match="embeddings of 8 numbers, but the model's have 16"):
        ConceptTransform(8).fold_into(model)
    transform = ConceptTransform(DIM)
    with torch.no_grad():
        transform.image_weight[0, 0] = 1e-2
    with pytest.raises(ValueError, match=r"out of range of torch.float16.*model.float\(\)"):
        transform.fold_into(model.half(), t=-4)
    with pytest.raises(TypeError, match="got Linear"):
        transform.fold_into(torch.nn.Linear(2, 2))
