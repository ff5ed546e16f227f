"""Rows of two images, of unpaired feedback and of several kinds: columns, images, texts, and what is refused."""

import io

import datasets
import pytest
import torch
from samples import PROMPTS, make_image_pairs, make_preferences, make_unpaired, picture

from clip_po.candidates import CandidateTexts
from clip_po.data.anchored_rows import AnchoredRows
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.pairs import PreferencePairs
from clip_po.data.rows import as_rows
from clip_po.validation import UnreadableImage

NONE = CandidateTexts()


def rows_of(dataset, texts=None):
    return as_rows(dataset, CandidateTexts(texts), "train_dataset")


def same_picture(image, number):
    return image.tobytes() == picture(number).tobytes()


def jpg(number):
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def pick_a_pic(labels, **columns):
    rows = range(len(labels))
    return datasets.Dataset.from_dict(
        {
            "caption": [f"picture {n}" for n in rows],
            "jpg_0": [jpg(10 * n) for n in rows],
            "jpg_1": [jpg(10 * n + 1) for n in rows],
            "label_0": [label for label, _ in labels],
            "label_1": [label for _, label in labels],
            **columns,
        }
    )


def mixed():
    return datasets.concatenate_datasets(
        [make_preferences(2).remove_columns("clean_image"), make_image_pairs(3), make_unpaired(2)]
    )


def test_a_row_of_images_holds_its_text_and_the_chosen_image_first():
    rows = rows_of(make_image_pairs(7, rejected=3))
    assert isinstance(rows, AnchoredRows)
    row = rows.row(5, epoch=0)  # with 3 rejected images
    assert row["text"] == PROMPTS[1]
    assert row["image_count"] == 4
    assert same_picture(row["images"][0], 2005)
    assert all(same_picture(image, 3050 + n) for n, image in enumerate(row["images"][1:]))


def test_images_are_numbered_over_all_rows():
    rows = rows_of(make_image_pairs(7, rejected=3))
    assert rows.image_count == 7 + (1 + 2 + 3 + 1 + 2 + 3 + 1)
    numbers = [number for index in range(7) for number in rows.images_of(index)]
    assert numbers == list(range(rows.image_count))
    for index in range(7):
        for number, image in zip(rows.images_of(index), rows.row(index, 0)["images"], strict=True):
            assert rows.image("image", number).tobytes() == image.tobytes()


def test_pick_a_pic_loads_as_it_is():
    rows = rows_of(pick_a_pic([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], ranking_id=[1, 2, 3]))
    first, second, tie = (rows.row(index, 0) for index in range(3))
    assert [row["text"] for row in (first, second, tie)] == ["picture 0", "picture 1", "picture 2"]
    assert same_picture(first["images"][0], 0)
    assert same_picture(first["images"][1], 1)
    assert same_picture(second["images"][0], 11)
    assert same_picture(second["images"][1], 10)
    assert tie["label_smoothing"] == 0.5
    assert "label_smoothing" not in first
    rows.check(NONE, ["sigmoid"], "train_dataset")


def test_pick_a_pics_ties_need_a_loss_that_reads_them():
    rows = rows_of(pick_a_pic([(1.0, 0.0), (0.5, 0.5)]))
    with pytest.raises(ValueError, match=r"1 ties, which loss_type=\['ipo'\] can't read.*dataset.filter"):
        rows.check(NONE, ["ipo"], "train_dataset")
    without = rows.dataset.filter(lambda a, b: a != b, input_columns=["label_0", "label_1"])
    rows_of(without).check(NONE, ["ipo"], "train_dataset")


def test_concatenated_rows_are_of_the_kind_that_they_fill():
    rows = rows_of(mixed())
    assert rows.kinds == ["texts"] * 2 + ["images"] * 3 + ["unpaired"] * 2
    assert rows.row(0, 0)["rejected"] == [PROMPTS[1]]
    unpaired = [rows.row(index, 0) for index in (5, 6)]
    assert [row["desirable"] for row in unpaired] == [0, 1]
    assert [(row["chosen"], row["rejected"]) for row in unpaired] == [(PROMPTS[0], []), (PROMPTS[1], [])]
    assert [rows.row(index, 0)["desirable"] for index in range(5)] == [-1] * 5


def test_a_batch_of_all_kinds_points_at_the_pair_of_each_candidate(processor):
    pairs = PreferencePairs(mixed())
    rows = [pairs[index] for index in (2, 0, 5, 3)]
    batch = DataCollatorForContrastivePreference(processor)(rows)
    assert len(batch["pixel_values"]) == 2 + 1 + 1 + 2
    assert batch["candidate_images"].tolist() == [[0, 1], [2, 2], [3, -1], [4, 5]]
    named = [[batch["texts"][n] if n >= 0 else None for n in row] for row in batch["candidates"]]
    assert named == [[PROMPTS[0]] * 2, [PROMPTS[0], PROMPTS[1]], [PROMPTS[0], None], [PROMPTS[1]] * 2]
    assert batch["chosen"].tolist() == [0, 0, 0, 0]
    assert batch["rejected"].tolist() == [[1], [1], [-1], [1]]
    assert batch["desirable"].tolist() == [-1, -1, 0, -1]


def test_a_batch_of_texts_alone_has_the_keys_of_before(processor):
    pairs = PreferencePairs(make_preferences(4))
    batch = DataCollatorForContrastivePreference(processor)([pairs[index] for index in range(4)])
    assert set(batch) == {
        "pixel_values",
        "weight",
        "reg_row_weight",
        "counted",
        "texts",
        "candidates",
        "chosen",
        "rejected",
    }


def test_the_same_image_has_one_number_wherever_it_is():
    pairs = make_image_pairs(4)
    rows = rows_of(datasets.concatenate_datasets([pairs, pairs.select([2])]))
    assert rows.texts(2, 0)["image_ids"] == rows.texts(4, 0)["image_ids"]
    numbers = {number for index in range(4) for number in rows.texts(index, 0)["image_ids"]}
    assert len(numbers) == 8


def test_the_digest_changes_with_any_image_and_with_their_order():
    rows = make_image_pairs(4)
    digests = {
        rows_of(rows).digest("image"),
        rows_of(rows.select([1, 0, 2, 3])).digest("image"),
        rows_of(
            rows.rename_columns({"chosen_image": "x", "rejected_image": "chosen_image"}).rename_column(
                "x", "rejected_image"
            )
        ).digest("image"),
    }
    assert len(digests) == 3
    assert rows_of(make_image_pairs(4)).digest("image") in digests


def test_a_transform_of_the_user_applies():
    flipped = make_image_pairs(3).with_transform(
        lambda rows: {**rows, "chosen_image": [image.transpose(0) for image in rows["chosen_image"]]}
    )
    rows = rows_of(flipped)
    assert rows.transformed
    assert rows.row(1, 0)["images"][0].tobytes() == picture(2001).transpose(0).tobytes()
    assert same_picture(rows.row(1, 0)["images"][1], 3010)


def test_a_broken_image_is_named_with_row_and_column(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    rows = make_image_pairs(3).to_list()
    rows[1]["rejected_image"] = {"path": str(tmp_path / "a.png"), "bytes": None}
    broken = datasets.Dataset.from_list(rows).cast_column("rejected_image", datasets.Image())
    broken = broken.cast_column("chosen_image", datasets.Image())
    with pytest.raises(UnreadableImage, match=r"row 1.*'rejected_image'.*a\.png|'rejected_image'.*row 1.*a\.png"):
        rows_of(broken).row(1, 0)
    skipping = PreferencePairs(broken, on_bad_image="skip")
    assert skipping[1]["weight"] == skipping[1]["counted"] == 0
    assert len(skipping[1]["images"]) == 2
    assert "rejected_image" in skipping[1]["skipped"]
    assert skipping[0]["skipped"] == ""


REFUSED = {
    "empty text": (lambda: make_image_pairs(2, texts=["a", " "]), "sigmoid", "row 1: column 'text'"),
    "no rejected image": (
        lambda: make_image_pairs(2).map(
            lambda row: {"rejected_image": []},
            features=datasets.Features(
                {
                    "text": datasets.Value("string"),
                    "chosen_image": datasets.Image(),
                    "rejected_image": datasets.List(datasets.Image()),
                }
            ),
        ),
        "sigmoid",
        "row 0: column 'rejected_image' is empty",
    ),
    "several for ipo": (lambda: make_image_pairs(3, rejected=3), "ipo", "row 1: column 'rejected_image' has 2"),
    "paths as texts": (
        lambda: datasets.Dataset.from_dict({"text": ["a"], "chosen_image": ["a.png"], "rejected_image": ["b.png"]}),
        "sigmoid",
        r"column 'chosen_image' must hold images.*cast_column\('chosen_image'",
    ),
    "a label that is a number": (
        lambda: make_unpaired(3).cast_column("label", datasets.Value("int64")),
        "kto",
        r"row 0: column 'label' must be True.*cast_column\('label'",
    ),
    "a misspelled column": (
        lambda: make_image_pairs(2).add_column("wieght", [1.0, 2.0]),
        "sigmoid",
        "'wieght', which nothing reads",
    ),
    "a negative weight": (
        lambda: make_image_pairs(2).add_column("weight", [1.0, -2.0]),
        "sigmoid",
        "row 1: column 'weight'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_cannot_be_used_are_refused(kind):
    make, loss, says = REFUSED[kind]
    with pytest.raises(ValueError, match=says):
        rows_of(make()).check(NONE, [loss], "train_dataset")


def test_texts_must_be_among_given_candidates():
    for rows in (make_image_pairs(4), make_unpaired(4)):
        with pytest.raises(ValueError, match=r"row 3: column 'text' is .*not among candidate_texts"):
            rows_of(rows, PROMPTS[:3]).check(CandidateTexts(PROMPTS[:3]), ["sigmoid"], "train_dataset")


def test_workers_can_be_given_the_rows(processor):
    pairs = PreferencePairs(mixed())
    collate = DataCollatorForContrastivePreference(processor)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=collate, num_workers=1)
    here = collate([pairs[index] for index in range(4)])
    for name, value in next(iter(loader)).items():
        torch.testing.assert_close(value, here[name]) if isinstance(value, torch.Tensor) else None
