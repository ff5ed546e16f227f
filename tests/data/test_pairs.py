"""Rows by (epoch, position, row): attacks from it alone, regularization images in turn, padding without weight."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from samples import CLASSES, PROMPTS, picture

from clip_po.candidates import CandidateTexts
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.pairs import PreferencePairs, checked_pairs
from clip_po.data.sampler import EpochSampler
from clip_po.data.typographic_preferences import TypographicPreferences


def attack(**arguments):
    return TypographicAttack(**{"words": CLASSES, "min_side": 32, "size": (0.3, 0.5), **arguments})


def numbered(count):
    """Images whose colour is their number."""
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def number(image):
    return image.getpixel((0, 0))[0]


def unsaid(error, parts):
    return [part for part in parts if part not in str(error.value)]


def identity(rows):
    return rows


def drawn(dataset, keys, workers=0):
    """What each key gives, read by so many worker processes."""
    loader = torch.utils.data.DataLoader(dataset, sampler=keys, batch_size=4, num_workers=workers, collate_fn=identity)
    return [
        (row["image"].tobytes(), row["chosen"], row["rejected"], row["reg_image"].tobytes(), row["weight"])
        for rows in loader
        for row in rows
    ]


# ---- Preferences from labelled images


def test_class_is_chosen_and_a_word_of_another_class_rejected(labelled):
    preferences = TypographicPreferences(labelled, attack())
    for epoch in range(4):
        for index, label in enumerate(labelled["label"]):
            row = preferences.row(index, epoch)
            assert row["chosen"] == PROMPTS[label]
            assert set(row["rejected"]) < set(PROMPTS) - {row["chosen"]}
            assert row["rejected"] == [f"a photo of a {attack().word(index, epoch, exclude={CLASSES[label]})}"]


def test_the_rejected_word_is_written_on_the_clean_image(labelled):
    row = TypographicPreferences(labelled, attack())[3]
    word = row["rejected"][0].removeprefix("a photo of a ")
    assert row["clean_image"].tobytes() == labelled[3]["image"].tobytes()
    assert row["image"].tobytes() == attack().draw(labelled[3]["image"], word, 3).tobytes()
    assert row["image"].tobytes() != row["clean_image"].tobytes()


def test_rows_are_drawn_anew_each_epoch_unless_told_otherwise(labelled):
    for redraw, same in (("every_epoch", False), ("never", True)):
        preferences = TypographicPreferences(labelled, attack(redraw=redraw))
        assert preferences.redrawn is not same
        epochs = [[preferences.row(index, epoch)["image"].tobytes() for index in range(4)] for epoch in (0, 1)]
        assert (epochs[0] == epochs[1]) is same


def test_a_row_by_its_number_is_that_of_epoch_0(labelled):
    preferences = TypographicPreferences(labelled, attack())
    assert preferences[2]["image"].tobytes() == preferences.row(2, 0)["image"].tobytes()


def test_workers_draw_the_same_pixels_as_the_main_process(labelled):
    pairs = PreferencePairs(TypographicPreferences(labelled, attack(rotation=(-20, 20))), numbered(5))
    epochs = []
    for epoch in (0, 1):
        sampler = EpochSampler(len(pairs), 6, seed=0)
        sampler.set_epoch(epoch)
        epochs.append(drawn(pairs, list(sampler)))
        assert drawn(pairs, list(sampler), workers=2) == epochs[-1]
    assert len({image for rows in epochs for image, *_ in rows}) == 2 * len(pairs)


def test_class_names_columns_and_template_may_be_given(labelled):
    renamed = labelled.rename_columns({"image": "img", "label": "fine"}).cast_column("fine", datasets.Value("int64"))
    preferences = TypographicPreferences(
        renamed, attack(words=["1", "2"]), ["one", "two", "three", "four"], "the digit {}.", "img", "fine"
    )
    assert preferences.candidate_texts == ["the digit one.", "the digit two.", "the digit three.", "the digit four."]
    assert preferences.all_texts == [*preferences.candidate_texts, "the digit 1.", "the digit 2."]
    assert preferences[1]["chosen"] == "the digit two."


def without_names(labelled):
    return labelled.cast_column("label", datasets.Value("int64"))


WRONG_LABELLED = {
    "template-without-place": (
        lambda d: d,
        {"template": "a photo"},
        "template must contain exactly one '{}'",
        "'a photo'",
    ),
    "template-with-two-places": (lambda d: d, {"template": "{} {}"}, "template must contain exactly one '{}'"),
    "no-image-column": (
        lambda d: d.rename_column("image", "img"),
        {},
        "image_column='image' is not a column",
        "['img', 'label']",
    ),
    "no-label-column": (lambda d: d, {"label_column": "fine"}, "label_column='fine' is not a column"),
    "no-class-names": (without_names, {}, "Column 'label'", "without names", "pass class_names"),
    "label-too-high": (
        without_names,
        {"class_names": CLASSES[:2]},
        "Row 2: column 'label' is 2",
        "a class number in 0..1",
        "give class_names an entry",
    ),
    "label-missing": (
        lambda d: without_names(d).map(lambda row, i: {"label": None if i == 5 else 0}, with_indices=True),
        {"class_names": CLASSES},
        "Row 5: column 'label' is None",
        "drop the row",
    ),
}


@pytest.mark.parametrize("case", WRONG_LABELLED.values(), ids=WRONG_LABELLED)
def test_unusable_labelled_images_are_refused_with_a_remedy(case, labelled):
    change, arguments, *parts = case
    dataset = change(labelled)
    with pytest.raises(ValueError) as error:
        TypographicPreferences(dataset, attack(), **arguments)
    assert not unsaid(error, parts)


def test_an_unreadable_labelled_image_is_named_by_its_row():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [picture(0), {"bytes": b"junk", "path": None}], "label": [0, 1]}
    preferences = TypographicPreferences(datasets.Dataset.from_dict(columns, features=features), attack())
    with pytest.raises(ValueError, match="Row 1: the image in column 'image' can't be read"):
        preferences[1]


def test_every_written_word_is_rejected_and_rows_keep_their_weight(labelled):
    weighted = labelled.add_column("confidence", [i / 16 for i in range(16)])
    preferences = TypographicPreferences(weighted, attack(count=(2, 2)), weight_column="confidence")
    row = preferences.row(5, 3)
    assert len(set(row["rejected"])) == 2
    assert row["chosen"] not in row["rejected"]
    assert row["weight"] == 5 / 16
    assert preferences.most_rejected == 2
    assert TypographicPreferences(labelled, attack(), rejected="others").most_rejected == 3


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_weigh_is_named_by_its_row(labelled, value):
    weighted = labelled.add_column("weight", [1.0] * 15 + [value])
    with pytest.raises(ValueError, match="Row 15: column 'weight' must be a finite number >= 0, got"):
        TypographicPreferences(weighted, attack(), weight_column="weight")


def test_words_that_are_no_class_are_rejected_as_they_are_read(labelled):
    words = attack(other_words=["moon", "Cat"], other_share=1.0)
    preferences = TypographicPreferences(labelled, words)
    assert preferences.row(0, 0)["rejected"] == ["a photo of a moon"]
    assert preferences.all_texts == [*PROMPTS, "a photo of a moon"]


# ---- Pairs with regularization images


def test_positions_beyond_the_last_row_weigh_nothing(preferences):
    pairs = PreferencePairs(preferences, "clean_image")
    rows = [pairs[key] for key in EpochSampler(len(preferences), 8, seed=0)]
    assert [row["weight"] for row in rows] == [1.0] * 13 + [0.0] * 3
    assert [row["reg_row_weight"] for row in rows] == [1.0] * 13 + [0.0] * 3


def test_rows_keep_their_own_weight_except_as_padding(preferences):
    pairs = PreferencePairs(preferences.add_column("weight", [float(i) for i in range(13)]))
    assert [pairs[0, position, 4]["weight"] for position in (0, 12, 13)] == [4.0, 4.0, 0.0]


def test_without_regularization_images_there_is_nothing_to_weigh(preferences):
    row = PreferencePairs(preferences)[0]
    assert row["reg_row_weight"] == 0.0
    assert "reg_image" not in row


def test_clean_image_is_the_regularization_image_of_its_row(preferences):
    pairs = PreferencePairs(preferences, "clean_image")
    for key in EpochSampler(13, 1, seed=1):
        assert pairs[key]["reg_image"].tobytes() == preferences[key[2]]["clean_image"].tobytes()


@pytest.mark.parametrize("images", [5, 13, 30])
def test_regularization_images_are_all_used_before_one_repeats(images, preferences):
    pairs = PreferencePairs(preferences, numbered(images), seed=3)
    seen = [number(pairs[epoch, position, 0]["reg_image"]) for epoch in range(6) for position in range(13)]
    for start in range(0, len(seen) - images + 1, images):
        assert sorted(seen[start : start + images]) == list(range(images))


def test_regularization_images_come_in_another_order_each_time(preferences):
    pairs = PreferencePairs(preferences, numbered(13))
    orders = [[number(pairs[epoch, position, 0]["reg_image"]) for position in range(13)] for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3


def test_a_target_is_the_clean_image_of_its_own_row(preferences):
    pairs = PreferencePairs(preferences, numbered(5), targets="clean_image")
    assert pairs.fixed_images == ("image", "reg_image", "target_image")
    assert pairs.image_count("target_image") == 13
    assert pairs.fixed_image("target_image", 4).tobytes() == preferences[4]["clean_image"].tobytes()
    assert pairs[1, 3, 8]["target_image"].tobytes() == preferences[8]["clean_image"].tobytes()
    pairs.attach_reference({"target_image": torch.arange(13.0).unsqueeze(1)})
    row = pairs[1, 3, 8]
    assert row["ref_target_image_embeds"].item() == 8
    assert "target_image" not in row  # what is known of it need not be read


def test_no_target_is_read_where_the_ordinary_image_is_it_already(preferences):
    assert "target_image" not in PreferencePairs(preferences, "clean_image", targets="clean_image")[0]
    assert "target_image" in PreferencePairs(preferences, None, targets="clean_image")[0]


def test_regularization_images_do_not_depend_on_the_rows_number(preferences):
    pairs = PreferencePairs(preferences, numbered(30))
    assert len({number(pairs[2, 7, index]["reg_image"]) for index in range(13)}) == 1


def test_classes_become_texts(labelled):
    table = labelled.add_column("rejected_label", [(label + 1) % 4 for label in labelled["label"]])
    row = PreferencePairs(table, candidate_texts=CandidateTexts(PROMPTS))[2]
    assert (row["chosen"], row["rejected"]) == (PROMPTS[2], [PROMPTS[3]])


@pytest.mark.parametrize("redraw", ["every_epoch", "never"])
def test_fixed_images_are_those_that_no_epoch_changes(redraw, labelled):
    preferences = TypographicPreferences(labelled, attack(redraw=redraw))
    image = ("image",) if redraw == "never" else ()
    assert PreferencePairs(preferences).fixed_images == image
    assert PreferencePairs(preferences, "clean_image").fixed_images == (*image, "reg_image")


def test_fixed_images_are_counted_and_read_by_number(preferences):
    pairs, apart = PreferencePairs(preferences, "clean_image"), PreferencePairs(preferences, numbered(5))
    assert [pairs.image_count(column) for column in ("image", "reg_image")] == [13, 13]
    assert [apart.image_count(column) for column in ("image", "reg_image")] == [13, 5]
    assert pairs.fixed_image("image", 2).tobytes() == preferences[2]["image"].tobytes()
    assert pairs.fixed_image("reg_image", 2).tobytes() == preferences[2]["clean_image"].tobytes()
    assert number(apart.fixed_image("reg_image", 4)) == 4


def test_embeddings_of_the_reference_follow_their_images(preferences):
    pairs = PreferencePairs(preferences, numbered(5))
    pairs.attach_reference({"image": torch.arange(13.0).unsqueeze(1), "reg_image": torch.arange(5.0).unsqueeze(1)})
    for key in ((0, 3, 8), (1, 12, 2), (4, 14, 0)):
        row = pairs[key]
        assert row["ref_image_embeds"].item() == key[2]
        assert row["ref_reg_image_embeds"].item() == number(row["reg_image"])


def test_an_unreadable_regularization_image_is_named_by_its_row(preferences):
    images = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"junk", "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    with pytest.raises(ValueError, match="reg_dataset row 0: the image in column 'image' can't be read"):
        PreferencePairs(preferences, images)[3]


# ---- Pairs that were checked


def checked(folder, preferences, regularization=None, candidate_texts=None, **arguments):
    args = ContrastivePOConfig(str(folder), **arguments)
    return checked_pairs(preferences, regularization, CandidateTexts(candidate_texts), args, "train_dataset")


def test_streamed_rows_are_refused(preferences, tmp_path):
    with pytest.raises(TypeError) as error:
        checked(tmp_path, preferences.to_iterable_dataset())
    assert not unsaid(error, ["train_dataset is streamed", "without streaming=True"])


def test_rows_of_another_type_are_refused(tmp_path):
    with pytest.raises(TypeError) as error:
        checked(tmp_path, [{"image": picture(0), "chosen": "a", "rejected": "b"}])
    assert not unsaid(error, ["train_dataset must be a datasets.Dataset", "got list", "Dataset.from_list(rows)"])


def test_unusable_rows_are_refused_before_training(preferences, tmp_path):
    table = preferences.map(lambda row, i: {"rejected": row["chosen"]} if i == 6 else {}, with_indices=True)
    with pytest.raises(ValueError, match="train_dataset row 6: columns 'chosen' and 'rejected' are both"):
        checked(tmp_path, table)


def test_attack_words_must_be_among_the_candidates(labelled, tmp_path):
    preferences = TypographicPreferences(labelled, attack(words=["cat", "horse"]))
    with pytest.raises(ValueError) as error:
        checked(tmp_path, preferences, candidate_texts=PROMPTS)
    assert not unsaid(error, ["train_dataset may draw the texts ['a photo of a horse']", "dataset.candidate_texts"])
    checked(tmp_path, preferences)
    checked(tmp_path, TypographicPreferences(labelled, attack()), candidate_texts=PROMPTS)


@pytest.mark.parametrize("arguments", [{}, {"loss_type": ["kto_pair"], "reg_weight": 0.0}])
def test_regularization_without_ordinary_images_is_refused(arguments, preferences, tmp_path):
    with pytest.raises(ValueError) as error:
        checked(tmp_path, preferences.remove_columns("clean_image"), **arguments)
    assert not unsaid(error, ["no reg_dataset", "no column 'clean_image'", "Pass reg_dataset=...", "reg_weight=0"])


def test_no_ordinary_images_are_needed_where_nothing_asks_for_them(preferences, tmp_path):
    pairs = checked(tmp_path, preferences.remove_columns("clean_image"), reg_weight=0.0)
    assert pairs.completion.regularization is None
    assert checked(tmp_path, preferences, numbered(2), reg_weight=0.0).completion.regularization is None


def test_distillation_needs_clean_images(preferences, tmp_path):
    with pytest.raises(ValueError, match="no column 'clean_image'"):
        checked(tmp_path, preferences.remove_columns("clean_image"), numbered(2), loss_type=["distillation"])
    assert checked(tmp_path, preferences, numbered(2), loss_type=["distillation"]).completion.targets == "clean_image"
    assert checked(tmp_path, preferences, numbered(2), loss_type=["sft"]).completion.targets is None


def test_pairwise_losses_refuse_rows_that_may_reject_several_texts(labelled, tmp_path):
    for rows in (
        TypographicPreferences(labelled, attack(), rejected="others"),
        TypographicPreferences(labelled, attack(count=(1, 2))),
    ):
        with pytest.raises(ValueError, match="rejects up to"):
            checked(tmp_path, rows, loss_type=["ipo"])
        checked(tmp_path, rows, loss_type=["sigmoid"])


def test_clean_images_are_taken_where_no_others_are_given(preferences, tmp_path):
    images = numbered(2)
    assert checked(tmp_path, preferences).completion.regularization == "clean_image"
    assert checked(tmp_path, preferences, images).completion.regularization is images


def test_unusable_regularization_images_are_refused(preferences, tmp_path):
    with pytest.raises(ValueError, match="reg_dataset has the columns \\['img'\\]"):
        checked(tmp_path, preferences, numbered(2).rename_column("image", "img"))


def test_images_drawn_anew_cannot_be_seen_once(labelled, tmp_path):
    with pytest.raises(ValueError) as error:
        checked(tmp_path, TypographicPreferences(labelled, attack()), precompute_ref_log_probs=True)
    assert not unsaid(error, ["precompute_ref_log_probs=True", "train_dataset", "redraw='never'"])
    checked(tmp_path, TypographicPreferences(labelled, attack(redraw="never")), precompute_ref_log_probs=True)


def test_the_data_seed_orders_regularization_images_where_it_is_given(preferences, tmp_path):
    assert checked(tmp_path, preferences, seed=7).completion.seed == 7
    assert checked(tmp_path, preferences, seed=7, data_seed=8).completion.seed == 8


def test_checks_leave_pixels_as_they_are(preferences):
    row = PreferencePairs(preferences, "clean_image")[0]
    assert (np.asarray(row["image"]) == np.asarray(picture(1000))).all()
