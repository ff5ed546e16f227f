import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from clip_po.data.digits import (
    DIGIT_NAMES,
    IMAGE_SIDE,
    MODEL_PATH,
    PROMPT_TEMPLATE,
    digit_attack,
    digits_table,
    load_digits_dataset,
    render_digit,
    split_digits,
)


def test_split_is_disjoint_and_whole():
    parts = split_digits()
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 997, "validation": 300, "test": 500}
    assert sorted(id_ for ids in parts.values() for id_ in ids) == list(range(1797))
    _, labels = digits_table()
    assert np.bincount(labels[parts["test"]]).tolist() == [50] * 10
    assert np.bincount(labels[parts["validation"]]).tolist() == [30] * 10


def test_split_is_the_one_that_the_model_was_trained_with():
    # Another split would put digits of the model's own training into the test part.
    assert split_digits()["test"][:8] == [3, 7, 29, 30, 37, 38, 45, 47]
    assert sum(split_digits()["test"]) == 443301


def test_callers_cannot_change_the_split_or_the_table():
    split_digits()["train"].clear()
    assert len(split_digits()["train"]) == 997
    with pytest.raises(ValueError, match="read-only"):
        digits_table()[0][0] = 0


def test_rendering_depends_on_its_key_alone():
    pixels, _ = digits_table()
    first, again, other = (np.asarray(render_digit(pixels[5], key)) for key in ("0/5/0", "0/5/0", "0/5/1"))
    assert first.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert (first == again).all()
    assert (first != other).any()


def test_digit_leaves_room_for_a_word():
    pixels, _ = digits_table()
    for digit in range(50):
        image = np.asarray(render_digit(pixels[digit], str(digit))).astype(int)
        paper = np.median(image.reshape(-1, 3), axis=0)
        inked = np.abs(image - paper).max(-1) > 30
        for axis in (0, 1):
            assert 0.15 * IMAGE_SIDE < inked.any(axis).sum() < 0.65 * IMAGE_SIDE


def test_dataset_columns_and_order():
    data = load_digits_dataset("validation", renderings=2)
    assert data.column_names == ["image", "label", "digit"]
    assert data.features["label"].names == list(DIGIT_NAMES)
    assert data["digit"] == split_digits()["validation"] * 2
    _, labels = digits_table()
    assert data["label"] == labels[data["digit"]].tolist()
    first, second = (np.asarray(data[row]["image"]) for row in (0, 300))
    assert first.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert (first != second).any()


def test_dataset_is_the_same_every_time():
    first, again, other = (load_digits_dataset("validation", seed=seed)["image"] for seed in (0, 0, 1))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again, strict=True))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("split", "renderings"), [("dev", 1), ("test", 0)])
def test_dataset_says_what_is_wrong(split, renderings):
    with pytest.raises(ValueError, match="got"):
        load_digits_dataset(split, renderings)


def test_unseen_attack_shares_neither_fonts_nor_places_with_training():
    training, unseen = digit_attack("training"), digit_attack("unseen")
    assert not set(training.fonts) & set(unseen.fonts)
    assert not set(training.places) & set(unseen.places)
    assert all("Serif" in font or "Mono" in font for font in unseen.fonts)
    with pytest.raises(ValueError, match="settings"):
        digit_attack("test")


def accuracy(model, processor, images, labels):
    texts = [PROMPT_TEMPLATE.format(name) for name in DIGIT_NAMES]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        guesses = model(**inputs).logits_per_image.argmax(-1)
    return (guesses == torch.tensor(labels)).float().mean().item()


def test_embedded_model_is_fooled_as_its_card_says():
    model, processor = CLIPModel.from_pretrained(MODEL_PATH), CLIPProcessor.from_pretrained(MODEL_PATH)
    data, attack = load_digits_dataset("test", seed=2), digit_attack("unseen", seed=2)
    labels, images = data["label"], list(data["image"])
    words = [attack.word(row, exclude=[DIGIT_NAMES[label]]) for row, label in enumerate(labels)]
    attacked = [attack.draw(image, word, row) for row, (image, word) in enumerate(zip(images, words, strict=True))]
    occluded = [
        attack.draw_control(image, word, row) for row, (image, word) in enumerate(zip(images, words, strict=True))
    ]
    clean = accuracy(model, processor, images, labels)
    typographic = accuracy(model, processor, attacked, labels)
    written = accuracy(model, processor, attacked, [DIGIT_NAMES.index(word) for word in words])
    assert clean > 0.95
    assert typographic < clean / 2
    assert written > 0.5
    assert accuracy(model, processor, occluded, labels) > clean - 0.06


def test_embedded_model_is_small():
    assert sum(file.stat().st_size for file in MODEL_PATH.iterdir()) < 6e6
