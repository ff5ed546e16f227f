"""Formats: what is accepted, and that what is refused is named with its row, column and remedy."""

import io

import datasets
import pytest
from PIL import Image

from clip_po.data.formats import (
    as_list,
    check_candidates,
    check_preferences,
    check_regularization,
    read_row,
    row_format,
    to_texts,
)

PROMPTS = ["a cat", "a dog", "a bird"]
PICTURE = Image.new("RGB", (4, 4))


def rows(**columns):
    count = len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"image": [PICTURE] * count, **columns})


def unsaid(error, parts):
    return [part for part in parts if part not in str(error.value)]


CANDIDATES = {
    "one-text": (["a cat"], ValueError, "at least two texts", "['a cat']"),
    "no-text": ([], ValueError, "at least two texts"),
    "a-string": ("a cat", ValueError, "candidate_texts must be a list", "'a cat'"),
    "twice": (["a cat", "a dog", "a cat"], ValueError, "candidate_texts[2] is 'a cat'", "position 0", "once"),
    "no-string": (["a cat", 7], TypeError, "candidate_texts[1] must be a string, got 7"),
}


@pytest.mark.parametrize("case", CANDIDATES.values(), ids=CANDIDATES)
def test_candidate_texts_without_a_policy_are_refused(case):
    texts, kind, *parts = case
    with pytest.raises(kind) as error:
        check_candidates(texts)
    assert not unsaid(error, parts)


@pytest.mark.parametrize("texts", [None, PROMPTS, tuple(PROMPTS)])
def test_usable_candidate_texts_are_accepted(texts):
    check_candidates(texts)


UNUSABLE_COLUMNS = {
    "other-names": (
        {"caption": ["a cat"]},
        PROMPTS,
        "has the columns ['caption', 'image']",
        "rename_column(old, new)",
        "TypographicPreferences",
    ),
    "labels-without-prompts": (
        {"label": [0], "rejected_label": [1]},
        None,
        "positions in `candidate_texts`",
        "Pass the class prompts",
    ),
    "rejected-missing": ({"chosen": ["a cat"]}, None, "no column 'rejected'", "['sigmoid']", "only 'sft'"),
    "rejected-label-missing": ({"label": [0]}, PROMPTS, "no column 'rejected_label'", "only 'sft'"),
    "image-of-paths": (
        {"image": ["cat.png"], "chosen": ["a cat"], "rejected": ["a dog"]},
        None,
        "column 'image' must be datasets.Image()",
        "cast_column('image', datasets.Image())",
    ),
    "clean-image-of-paths": (
        {"clean_image": ["cat.png"], "chosen": ["a cat"], "rejected": ["a dog"]},
        None,
        "column 'clean_image' must be datasets.Image()",
        "cast_column('clean_image', datasets.Image())",
    ),
    "chosen-of-numbers": (
        {"chosen": [0], "rejected": ["a dog"]},
        None,
        "column 'chosen' must be a string",
        "int64",
        "dataset.map",
    ),
    "chosen-of-lists": ({"chosen": [["a cat"]], "rejected": ["a dog"]}, None, "column 'chosen' must be a string"),
    "rejected-of-numbers": (
        {"chosen": ["a cat"], "rejected": [1]},
        None,
        "column 'rejected' must be a string or a list of strings",
    ),
    "candidates-of-strings": (
        {"chosen": ["a cat"], "rejected": ["a dog"], "candidates": ["a cat, a dog"]},
        None,
        "column 'candidates' must be a list of strings",
    ),
    "label-of-strings": (
        {"label": ["cat"], "rejected_label": [1]},
        PROMPTS,
        "column 'label' must be a ClassLabel or an integer",
    ),
    "rejected-label-of-strings": (
        {"label": [0], "rejected_label": [["dog"]]},
        PROMPTS,
        "column 'rejected_label' must be a class or a list of classes",
    ),
    "weight-of-strings": (
        {"chosen": ["a cat"], "rejected": ["a dog"], "weight": ["1"]},
        None,
        "column 'weight' must be a number",
        "dataset.map",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE_COLUMNS.values(), ids=UNUSABLE_COLUMNS)
def test_missing_or_mistyped_columns_are_named_with_a_remedy(case):
    columns, candidate_texts, *parts = case
    with pytest.raises(ValueError) as error:
        check_preferences(rows(**columns), candidate_texts, ["sigmoid"], "eval_dataset")
    assert not unsaid(error, ["eval_dataset", *parts])


FINE = {"chosen": "a cat", "rejected": "a dog"}
FINE_CLASSES = {"label": 0, "rejected_label": 1}

UNUSABLE_ROWS = {
    "equal-texts": (
        {"chosen": "a cat", "rejected": "a cat"},
        None,
        "'chosen' and 'rejected' are both 'a cat'",
        "Drop the row",
    ),
    "chosen-among-rejected": (
        {"chosen": "a cat", "rejected": ["a dog", "a cat"]},
        None,
        "'chosen' and 'rejected' are both 'a cat'",
    ),
    "rejected-twice": (
        {"chosen": "a cat", "rejected": ["a dog", "a dog"]},
        None,
        "column 'rejected' has a repeated entry",
        "once",
    ),
    "chosen-null": (
        {"chosen": None, "rejected": "a dog"},
        None,
        "column 'chosen' must be a non-empty string",
        "got None",
    ),
    "chosen-blank": (
        {"chosen": "  ", "rejected": "a dog"},
        None,
        "column 'chosen' must be a non-empty string",
        "'  '",
    ),
    "rejected-blank": (
        {"chosen": "a cat", "rejected": ""},
        None,
        "column 'rejected' must be a non-empty string",
        "''",
    ),
    "rejected-null": (
        {"chosen": "a cat", "rejected": None},
        PROMPTS,
        "'rejected' has no rejected text",
        "Drop the row or fill it",
    ),
    "rejected-empty-list": (
        {"chosen": "a cat", "rejected": []},
        PROMPTS,
        "'rejected' has no rejected text",
        "['sigmoid']",
    ),
    "chosen-no-candidate": (
        {"chosen": "a ship", "rejected": "a dog"},
        PROMPTS,
        "column 'chosen' is 'a ship'",
        "not among the candidate texts ['a cat', 'a dog', 'a bird']",
        "Add it to candidate_texts",
    ),
    "rejected-no-candidate": (
        {"chosen": "a cat", "rejected": ["a dog", "a ship"]},
        PROMPTS,
        "column 'rejected' is 'a ship'",
        "leave candidate_texts out",
    ),
    "not-among-own-candidates": (
        {**FINE, "candidates": ["a dog", "a bird"]},
        None,
        "column 'chosen' is 'a cat'",
        "not among the candidate texts ['a dog', 'a bird']",
    ),
    "one-own-candidate": ({**FINE, "candidates": ["a cat"]}, None, "column 'candidates'", "at least two texts"),
    "own-candidate-twice": (
        {**FINE, "candidates": ["a cat", "a dog", "a cat"]},
        None,
        "column 'candidates'",
        "'a cat'",
        "once",
    ),
    "weight-negative": ({**FINE, "weight": -0.5}, None, "column 'weight' must be a finite number >= 0, got -0.5"),
    "weight-infinite": ({**FINE, "weight": float("inf")}, None, "column 'weight'", "got inf"),
    "weight-nan": ({**FINE, "weight": float("nan")}, None, "column 'weight'", "got nan"),
    "weight-null": ({**FINE, "weight": None}, None, "column 'weight'", "got None"),
    "label-too-high": (
        {"label": 3, "rejected_label": 1},
        PROMPTS,
        "column 'label' is 3",
        "a class number in 0..2",
        "give candidate_texts an entry for every class",
    ),
    "label-unlabelled": ({"label": -1, "rejected_label": 1}, PROMPTS, "column 'label' is -1", "drop the row"),
    "label-null": ({"label": None, "rejected_label": 1}, PROMPTS, "column 'label' is None", "0..2"),
    "rejected-label-too-high": (
        {"label": 0, "rejected_label": [1, 9]},
        PROMPTS,
        "column 'rejected_label' is 9",
        "0..2",
    ),
    "equal-classes": (
        {"label": 1, "rejected_label": 1},
        PROMPTS,
        "'label' and 'rejected_label' are both 1",
        "Drop the row",
    ),
    "rejected-class-twice": (
        {"label": 0, "rejected_label": [1, 1]},
        PROMPTS,
        "column 'rejected_label' has a repeated entry",
        "once",
    ),
    "rejected-label-null": ({"label": 0, "rejected_label": None}, PROMPTS, "'rejected_label' has no rejected text"),
}


@pytest.mark.parametrize("case", UNUSABLE_ROWS.values(), ids=UNUSABLE_ROWS)
def test_unusable_row_is_named_with_column_and_remedy(case):
    wrong, candidate_texts, *parts = case
    listed = any(isinstance(value, list) for value in (wrong.get("rejected"), wrong.get("rejected_label")))
    fine = {**(FINE if "chosen" in wrong else FINE_CLASSES), "candidates": ["a cat", "a dog"], "weight": 1.0}
    if listed:
        fine = {key: [value] if key.startswith("rejected") else value for key, value in fine.items()}
    table = rows(**{column: [fine[column], wrong[column]] for column in wrong})
    with pytest.raises(ValueError) as error:
        check_preferences(table, candidate_texts, ["sigmoid"], "train_dataset")
    assert not unsaid(error, ["train_dataset row 1", *parts])


def test_long_lists_of_candidates_are_cut_in_messages():
    with pytest.raises(ValueError, match=r"'class 5'\]\.\.\. \(1000 texts\)"):
        check_preferences(rows(chosen=["a cat"], rejected=["a dog"]), [f"class {i}" for i in range(1000)], ["sigmoid"])


def test_row_without_rejected_text_has_nothing_to_choose_from():
    with pytest.raises(ValueError) as error:
        check_preferences(rows(chosen=["a cat"]), None, ["sft"])
    assert not unsaid(error, ["row 0", "'a cat' is its only candidate text", "candidate_texts", "'candidates'"])


def test_empty_preferences_are_refused():
    with pytest.raises(ValueError, match="eval_dataset is empty; give it at least one row"):
        check_preferences(rows(chosen=["a cat"], rejected=["a dog"]).select([]), None, ["sigmoid"], "eval_dataset")


ACCEPTED = {
    "one-rejected-text": ({"chosen": ["a cat"], "rejected": ["a dog"]}, None, ["sigmoid"]),
    "several-rejected-texts": ({"chosen": ["a cat"], "rejected": [["a dog", "a bird"]]}, None, ["sigmoid"]),
    "candidates-given-once": ({"chosen": ["a cat"], "rejected": ["a dog"]}, PROMPTS, ["ipo"]),
    "own-candidates": ({"chosen": ["a cat"], "rejected": ["a dog"], "candidates": [PROMPTS]}, None, ["sigmoid"]),
    "own-candidates-in-some-rows": (
        {"chosen": ["a cat"] * 2, "rejected": ["a dog"] * 2, "candidates": [PROMPTS, None]},
        None,
        ["sigmoid"],
    ),
    "classes": ({"label": [0], "rejected_label": [2]}, PROMPTS, ["sigmoid"]),
    "several-rejected-classes": ({"label": [0], "rejected_label": [[1, 2]]}, PROMPTS, ["sigmoid"]),
    "sft-without-rejected": ({"chosen": ["a cat"]}, PROMPTS, ["sft"]),
    "sft-classes-without-rejected": ({"label": [0]}, PROMPTS, ["sft"]),
    "sft-with-own-candidates": ({"chosen": ["a cat"], "candidates": [PROMPTS]}, None, ["sft"]),
    "weights": ({"chosen": ["a cat"] * 2, "rejected": ["a dog"] * 2, "weight": [0, 3]}, None, ["sigmoid"]),
    "other-columns": ({"chosen": ["a cat"], "rejected": ["a dog"], "note": [{"by": "me"}]}, None, ["sigmoid"]),
}


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED)
def test_usable_rows_are_accepted(case):
    columns, candidate_texts, losses = case
    check_preferences(rows(**columns), candidate_texts, losses)


def test_class_label_features_are_accepted():
    feature = datasets.ClassLabel(names=["cat", "dog", "bird"])
    table = rows(label=[0], rejected_label=[1]).cast_column("label", feature).cast_column("rejected_label", feature)
    check_preferences(table, PROMPTS, ["sigmoid"])


def test_one_loss_that_needs_rejected_texts_is_enough_to_ask_for_them():
    with pytest.raises(ValueError, match=r"loss_type=\['sft', 'sigmoid'\] needs"):
        check_preferences(rows(chosen=["a cat"]), PROMPTS, ["sft", "sigmoid"])


def test_checks_read_no_image():
    broken = rows(chosen=["a cat"], rejected=["a dog"], image=[{"bytes": b"no image", "path": None}])
    check_preferences(broken.cast_column("image", datasets.Image()), None, ["sigmoid"])


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["image", "chosen", "rejected"], "image-preference"),
        (["image", "label", "rejected_label"], "class-preference"),
        (["image", "chosen", "label"], "image-preference"),
    ],
)
def test_format_is_told_by_the_columns(columns, form):
    assert row_format(columns) == form


def test_empty_regularization_is_refused():
    with pytest.raises(ValueError, match="reg_dataset is empty; give it at least one image"):
        check_regularization(rows(label=[0]).select([]))


def test_regularization_without_images_is_refused():
    with pytest.raises(ValueError) as error:
        check_regularization(rows(label=[0]).rename_column("image", "img"))
    assert not unsaid(error, ["reg_dataset has the columns ['img', 'label']", "rename_column(old, 'image')"])


def test_regularization_of_paths_is_refused():
    with pytest.raises(ValueError) as error:
        check_regularization(rows(image=["cat.png"]))
    assert not unsaid(error, ["reg_dataset column 'image'", "cast_column('image', datasets.Image())"])


@pytest.mark.parametrize("images", [[PICTURE], datasets.IterableDataset.from_generator(lambda: iter(()))])
def test_regularization_of_another_type_is_refused(images):
    with pytest.raises(TypeError, match=r"reg_dataset must be a datasets\.Dataset, got (list|IterableDataset)"):
        check_regularization(images)


def test_regularization_ignores_other_columns():
    check_regularization(rows(chosen=[1], weight=["heavy"]))


def as_file(kind):
    """What stands in an image column, and cannot be read."""
    if kind == "null":
        return None
    data = {"junk": b"no image at all", "empty": b""}
    if kind == "truncated":
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 80).save(buffer, "PNG")
        return {"bytes": buffer.getvalue()[:1500], "path": None}
    if kind == "missing":
        return {"bytes": None, "path": "nowhere/cat.png"}
    return {"bytes": data[kind], "path": None}


@pytest.mark.parametrize("kind", ["junk", "empty", "truncated", "missing", "null"])
def test_unreadable_image_is_named_by_its_row(kind):
    good = rows(chosen=["a cat"])[0]["image"]
    table = datasets.Dataset.from_dict(
        {"image": [good, as_file(kind)]}, features=datasets.Features({"image": datasets.Image()})
    )
    assert read_row(table, 0, "reg_dataset")["image"].size == (4, 4)
    with pytest.raises(ValueError) as error:
        read_row(table, 1, "reg_dataset")
    assert not unsaid(error, ["reg_dataset row 1", "'image'", "dataset.select"])


@pytest.mark.parametrize(("value", "listed"), [(None, []), ("a", ["a"]), (0, [0]), (["a", "b"], ["a", "b"])])
def test_one_value_alone_is_a_list_of_one(value, listed):
    assert as_list(value) == listed


def test_classes_become_their_texts():
    row = to_texts({"image": PICTURE, "label": 2, "rejected_label": [0, 1]}, PROMPTS)
    assert (row["chosen"], row["rejected"]) == ("a bird", ["a cat", "a dog"])
    assert row["image"] is PICTURE


@pytest.mark.parametrize(
    ("rejected", "texts"), [({"rejected": "a dog"}, ["a dog"]), ({"rejected": None}, []), ({}, [])]
)
def test_rejected_texts_become_a_list(rejected, texts):
    assert to_texts({"chosen": "a cat", **rejected}, None) == {"chosen": "a cat", "rejected": texts}
