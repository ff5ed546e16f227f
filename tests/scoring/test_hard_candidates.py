"""Hard candidates, against scores computed one by one."""

import datasets
import pytest
import torch
from samples import PROMPTS, make_image_pairs, make_preferences, make_trainer, picture
from transformers import CLIPModel

from clip_po.data.images import to_pixels
from clip_po.scoring.hard_candidates import embed_column, hard_images, hard_texts
from clip_po.scoring.scorer import Scorer
from clip_po.validation import UnreadableImage

TEXTS = ["a cat", "a dog", "A  DOG", "a bird", "a ship", "a tree", "the sea"]  # two are the same to the model


@pytest.fixture
def scorer(clip_folder):
    return Scorer(clip_folder, device="cpu", batch_size=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def captioned(rows=12, **columns):
    """Rows of images with texts."""
    values = {"image": [picture(row) for row in range(rows)], "chosen": [TEXTS[row % 6] for row in range(rows)]}
    features = {"image": datasets.Image(), "chosen": datasets.Value("string")}
    found = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    for name, column in columns.items():
        found = found.add_column(name, column)
    return found


def cosine(scorer, image, text):
    """One image and one text, by the methods of CLIPModel alone."""
    tokens = scorer.processor.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        one = scorer.model.get_image_features(to_pixels(scorer.processor, [image])).pooler_output
        other = scorer.model.get_text_features(**tokens).pooler_output
    return torch.cosine_similarity(one, other).item()


def sorted_texts(scorer, image, texts):
    return sorted(texts, key=lambda text: -cosine(scorer, image, text))


def test_the_hardest_wrong_texts_are_rejected(scorer):
    rows = captioned()
    found = hard_texts(rows, scorer, 3)
    assert len(found) == len(rows)
    for row in range(len(rows)):
        chosen = rows[row]["chosen"]
        wrong = {text.lower().replace("  ", " "): text for text in reversed(TEXTS[:6])}
        others = [text for text in wrong.values() if text.lower().split() != chosen.lower().split()]
        expected = sorted_texts(scorer, rows[row]["image"], others)[:3]
        assert [text.lower().split() for text in found[row]["rejected"]] == [t.lower().split() for t in expected]


def test_texts_to_choose_from_may_be_given(scorer):
    rows = captioned(4)
    offered = ["the sea", "A CAT", "a hill"]
    for row in hard_texts(rows, scorer, 5, texts=offered):
        right = row["chosen"].lower() == "a cat"
        expected = [text for text in offered if not (right and text == "A CAT")]
        # The first of two texts that the model can't tell apart stands for both.
        assert {text.lower() for text in row["rejected"]} == {text.lower() for text in expected}


def test_texts_of_rows_with_the_same_label_are_not_wrong(scorer):
    rows = captioned(6, label=[0, 1, 1, 0, 2, None])
    for row in hard_texts(rows, scorer, 10, label_column="label"):
        same = {other["chosen"].lower().split()[1] for other in rows if row["label"] == other["label"] is not None}
        wrong = {text.lower().split()[1] for text in row["rejected"]}
        assert not wrong & (same | {row["chosen"].lower().split()[1]})
        assert wrong | same | {row["chosen"].lower().split()[1]} == {"cat", "dog", "bird", "ship", "tree"}


def test_a_margin_leaves_out_what_may_be_right_too(scorer):
    rows, kept = captioned(), 0
    margin = 0.01
    found = {}
    for row in hard_texts(rows, scorer, 10, margin=margin):
        found[row["chosen"], tuple(row["image"].tobytes()[:60])] = row["rejected"]
    for row in rows:
        own = cosine(scorer, row["image"], row["chosen"])
        near = [abs(cosine(scorer, row["image"], text) - own + margin) for text in TEXTS]
        assert min(near) > 1e-6  # no wrong text is at the margin itself
        wrong = {text.lower() for text in TEXTS[:6] if cosine(scorer, row["image"], text) <= own - margin}
        wrong = {" ".join(text.split()) for text in wrong} - {" ".join(row["chosen"].lower().split())}
        rejected = found.get((row["chosen"], tuple(row["image"].tobytes()[:60])), [])
        assert {" ".join(text.lower().split()) for text in rejected} == wrong
        kept += bool(wrong)
    assert 0 < kept == len(found) < len(rows)


def test_rejected_texts_that_are_there_stay(scorer):
    rows = captioned(6, rejected=[["a hill"], ["the sea"], ["a tree"], ["a tree"], ["a cat"], ["a cat", "a hill"]])
    found = hard_texts(rows, scorer, 2)
    for row, before in zip(found, rows, strict=True):
        assert row["rejected"][: len(before["rejected"])] == before["rejected"]
        assert len(set(row["rejected"])) == len(row["rejected"])
        assert len(row["rejected"]) <= len(before["rejected"]) + 2
    assert sum(len(row) for row in found["rejected"]) > sum(len(row) for row in rows["rejected"])


def test_the_hardest_wrong_images_are_rejected(scorer):
    rows = make_image_pairs(9, texts=["a cat", "A  CAT", "a dog", "a bird"])
    rows = rows.remove_columns("rejected_image")
    found = hard_images(rows, scorer, 2)
    for row in range(len(rows)):
        text = rows[row]["text"]
        others = [n for n in range(9) if rows[n]["text"].lower().split() != text.lower().split()]
        expected = sorted(others, key=lambda n: -cosine(scorer, rows[n]["chosen_image"], text))[:2]
        pixels = [image.tobytes() for image in found[row]["rejected_image"]]
        assert pixels == [rows[n]["chosen_image"].tobytes() for n in expected]


def test_an_image_that_is_stored_twice_is_no_wrong_image_of_itself(scorer):
    rows = make_image_pairs(4)
    twice = rows.select([0, 1, 2, 3, 0]).remove_columns("text").add_column("text", ["a", "b", "c", "d", "e"])
    for row in hard_images(twice.remove_columns("rejected_image"), scorer, 10):
        wrong = {image.tobytes() for image in row["rejected_image"]}
        assert row["chosen_image"].tobytes() not in wrong
        assert len(wrong) == len(row["rejected_image"]) == 3


def test_rejected_images_that_are_there_stay(scorer):
    rows = make_image_pairs(6, rejected=2)
    for row, before in zip(hard_images(rows, scorer, 1), rows, strict=True):
        pixels = [image.tobytes() for image in row["rejected_image"]]
        assert pixels[:-1] == [image.tobytes() for image in before["rejected_image"]]


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_run_trains_on_hard_candidates(scorer, clip_folder, tmp_path, kind):
    if kind == "texts":
        rows = hard_texts(make_preferences(12).remove_columns("rejected"), scorer, 2)
    else:
        rows = hard_images(make_image_pairs(12).remove_columns("rejected_image"), scorer, 2)
    given = {"train_dataset": rows, "candidate_texts": None, "reg_weight": 0.0, "learning_rate": 1e-3}
    trainer = make_trainer(clip_folder, tmp_path, **given, max_steps=12, logging_steps=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


def test_embeddings_come_from_the_cache_for_the_same_model_and_images_alone(
    scorer, clip_folder, tmp_path, monkeypatch
):
    captioned().save_to_disk(tmp_path / "rows")
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    calls = []
    embed = Scorer.embed_images
    monkeypatch.setattr(Scorer, "embed_images", lambda self, images: calls.append(len(images)) or embed(self, images))

    def embedded(dataset, with_scorer):
        calls.clear()
        found = embed_column(dataset, "image", with_scorer)
        return found, [count for count in calls if count > 1]

    first, batches = embedded(rows, scorer)
    assert batches == [12]
    again, batches = embedded(datasets.load_from_disk(str(tmp_path / "rows")), Scorer(clip_folder, device="cpu"))
    assert batches == []
    assert torch.equal(first, again)
    model = CLIPModel.from_pretrained(clip_folder)
    torch.nn.init.normal_(model.visual_projection.weight)
    model.save_pretrained(tmp_path / "other")
    scorer.processor.save_pretrained(tmp_path / "other")
    other, batches = embedded(rows, Scorer(tmp_path / "other", device="cpu", batch_size=6))
    assert batches == [12]
    assert not torch.allclose(first, other, atol=1e-3)
    fewer, batches = embedded(rows.select(range(6)), scorer)
    assert batches == [6]
    torch.testing.assert_close(fewer, first[:6])


def test_errors_name_the_row_and_what_to_do(scorer, tmp_path):
    rows = captioned(4)
    with pytest.raises(ValueError, match="chosen"):
        hard_texts(rows.remove_columns("chosen"), scorer, 2)
    with pytest.raises(ValueError, match="k must be a whole number >= 1"):
        hard_texts(rows, scorer, 0)
    with pytest.raises(ValueError, match="No row has a wrong candidate"):
        hard_texts(rows, scorer, 2, texts=["A cat"] * 2, label_column=None, margin=2.0)
    with pytest.raises(ValueError, match="chosen of row 1"):
        hard_texts(rows.remove_columns("chosen").add_column("chosen", ["a", " ", "c", "d"]), scorer, 2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = datasets.Dataset.from_dict({"image": [str(broken)], "chosen": [PROMPTS[0]]})
    with pytest.raises(UnreadableImage, match=r"Row 0.*broken\.png"):
        hard_texts(paths.cast_column("image", datasets.Image()), scorer, 1, texts=PROMPTS)
