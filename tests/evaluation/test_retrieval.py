import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import ndcg_score

from clip_po.encoding import encode_images, encode_texts
from clip_po.evaluation import retrieval
from clip_po.evaluation.retrieval import evaluate_retrieval, read_captions, recall_at_k, retrieval_report


def embeddings(images=40, dim=6, seed=0):
    """One to four texts an image, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    owner = np.repeat(np.arange(images), [1 + i % 4 for i in range(images)])
    owner = np.random.default_rng(seed).permutation(owner)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    text = F.normalize(image[owner] + 0.8 * torch.randn(len(owner), dim, generator=generator), dim=1)
    return image, text, owner


def brute_force(image, text, owner, k):
    similarity = (image @ text.T).numpy()
    by_image = [any(owner[t] == i for t in np.argsort(-row)[:k]) for i, row in enumerate(similarity)]
    by_text = [owner[t] in np.argsort(-column)[:k] for t, column in enumerate(similarity.T)]
    return by_image, by_text


@pytest.mark.parametrize("cells", [1, 500, 10**9])
def test_recall_is_that_of_sorting_everything(monkeypatch, cells):
    monkeypatch.setattr(retrieval, "_CELLS_AT_ONCE", cells)
    image, text, owner = embeddings()
    hits = recall_at_k(image, text, owner, (1, 5, 10))
    for k in (1, 5, 10):
        by_image, by_text = brute_force(image, text, owner, k)
        assert hits.image_to_text[k].tolist() == by_image
        assert hits.text_to_image[k].tolist() == by_text
        assert 0 < sum(by_image) < len(image)


@pytest.mark.parametrize("cells", [1, 500, 10**9])
def test_ndcg_is_that_of_scikit_learn(monkeypatch, cells):
    monkeypatch.setattr(retrieval, "_CELLS_AT_ONCE", cells)
    image, text, owner = embeddings()
    hits = recall_at_k(image, text, owner, (1, 3, 10))
    similarity, relevant = (image @ text.T).numpy(), np.arange(len(image))[:, None] == owner
    for k in (1, 3, 10):
        by_image = [ndcg_score([r], [s], k=k) for r, s in zip(relevant, similarity, strict=True)]
        by_text = [ndcg_score([r], [s], k=k) for r, s in zip(relevant.T, similarity.T, strict=True)]
        assert hits.image_to_text_gain[k] == pytest.approx(by_image)
        assert hits.text_to_image_gain[k] == pytest.approx(by_text)
    report = retrieval_report(hits, resamples=2)
    assert report["image_to_text_ndcg@10"].value == pytest.approx(np.mean(by_image))
    assert report["text_to_image_ndcg@10"].value == pytest.approx(np.mean(by_text))


def test_ties_count_against_the_model_in_any_order():
    image = F.normalize(torch.ones(3, 4), dim=1)
    text = image[[0, 0, 1, 2]]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        owner = np.array([0, 0, 1, 2])[order]
        hits = recall_at_k(image, text, owner, (1, 2, 3))
        # Three of the four texts are others' for images 1 and 2, two for image 0.
        assert [hits.image_to_text[k].tolist() for k in (1, 2, 3)] == [[False] * 3, [False] * 3, [True, False, False]]
        assert [hits.text_to_image[k].any() for k in (1, 2)] == [False, False]
        assert hits.text_to_image[3].all()


def test_a_text_nearer_to_another_image_is_a_miss_for_both_ways():
    image = torch.eye(2)
    text = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.8, 0.1]]), dim=1)
    hits = recall_at_k(image, text, [0, 1, 0], (1, 2))
    assert hits.image_to_text[1].tolist() == [True, True]
    assert hits.text_to_image[1].tolist() == [True, False, True]
    assert hits.text_to_image[2].all()


@pytest.mark.parametrize(
    ("owner", "text", "ks", "said"),
    [
        ([0, 0], torch.eye(2), (1,), "Image 1 has no text"),
        ([0, 2], torch.eye(2), (1,), "image_of_text"),
        ([0], torch.eye(2), (1,), "image_of_text"),
        ([0, 1], torch.eye(2), (0,), "ks"),
        ([0, 1], torch.full((2, 2), torch.nan), (1,), "nan"),
        ([0, 1], torch.eye(2, 3), (1,), r"\(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(owner, text, ks, said):
    with pytest.raises(ValueError, match=said):
        recall_at_k(torch.eye(2), text, owner, ks)


def test_report_weighs_texts_alike_and_pairs_with_the_base():
    image, text, owner = embeddings()
    hits, base = recall_at_k(image, text, owner), recall_at_k(image, text.flip(1), owner)
    report = retrieval_report(hits, base)
    assert report["text_to_image_recall@5"].value == pytest.approx(hits.text_to_image[5].mean())
    assert report["image_to_text_recall@1"].value == pytest.approx(hits.image_to_text[1].mean())
    found = [report[f"{way}_recall@{k}"].value for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert report["mean_recall"].value == pytest.approx(np.mean(found))
    gained = 100 * (hits.text_to_image[5].mean() - base.text_to_image[5].mean())
    difference = report["text_to_image_recall@5_difference"]
    assert difference.value == pytest.approx(gained)
    assert difference.low < gained < difference.high
    same = retrieval_report(hits, hits)["mean_recall_difference"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_intervals_are_over_images_not_texts():
    # Ten equal texts an image hold no more evidence than one.
    image = torch.eye(30)
    wrong = torch.roll(image, 1, dims=0)
    once = torch.cat([image[:15], wrong[15:]])
    few = retrieval_report(recall_at_k(image, once, np.arange(30), (1,)))["text_to_image_recall@1"]
    many = retrieval_report(recall_at_k(image, once.repeat_interleave(10, 0), np.arange(30).repeat(10), (1,)))[
        "text_to_image_recall@1"
    ]
    assert (few.low, few.high) == pytest.approx((many.low, many.high))
    assert few.value == 0.5


def test_base_of_other_texts_is_refused():
    hits = recall_at_k(torch.eye(2), torch.eye(2), [0, 1], (1,))
    with pytest.raises(ValueError, match="other texts"):
        retrieval_report(hits, recall_at_k(torch.eye(2), torch.eye(2), [1, 0], (1,)))


@pytest.fixture
def captioned():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(5)]
    captions = [["a cat", "a small cat"], ["a dog"], ["a ship", "the sea"], ["a bird"], ["a tree"]]
    return datasets.Dataset.from_dict({"image": images, "caption": captions}).cast_column("image", datasets.Image())


def test_models_are_asked_in_one_pass(model, other_model, processor, captioned):
    hits = evaluate_retrieval({"a": model, "b": other_model}, processor, captioned, batch_size=2, disable_tqdm=True)
    captions, owner = read_captions(captioned, "caption")
    pixels = processor(images=list(captioned["image"]), return_tensors="pt")["pixel_values"]
    for name, asked in (("a", model), ("b", other_model)):
        with torch.no_grad():
            expected = recall_at_k(encode_images(asked, pixels), encode_texts(asked, processor, captions), owner)
        for k in (1, 5):
            assert hits[name].image_to_text[k].tolist() == expected.image_to_text[k].tolist()
            assert hits[name].text_to_image[k].tolist() == expected.text_to_image[k].tolist()


def test_captions_are_lists_or_single_texts(captioned):
    assert read_captions(captioned, "caption")[1].tolist() == [0, 0, 1, 2, 2, 3, 4]
    single = captioned.remove_columns("caption").add_column("text", ["a", "b", "c", "d", "e"])
    assert read_captions(single, "text")[0] == ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="caption_column='words'"):
        read_captions(single, "words")
    empty = captioned.remove_columns("caption").add_column("caption", [["a"], [], ["c"], ["d"], ["e"]])
    with pytest.raises(ValueError, match="Row 1"):
        read_captions(empty, "caption")
