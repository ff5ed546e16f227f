"""Preferences for a concept: the other attribute, its own, or neither, in rows that the trainer takes."""

from collections import Counter

import datasets
import pytest
from samples import picture

from clip_po.concept.preferences import keep_attribute, neutralize_attribute, neutralize_texts, reverse_attribute
from clip_po.config import ContrastivePOConfig
from clip_po.data.formats import check_preferences
from clip_po.trainer import ContrastivePOTrainer

TEMPLATE = "a photo of a {attribute} who is a {job}"
NAMES = ("man", "woman")
PAIRS = [(f"a man who is a {job}", f"a woman who is a {job}") for job in ("doctor", "nurse", "pilot")]
JOBS = ("doctor", "nurse")


def people(rows=5, attributes=NAMES, image_column="image"):
    features = datasets.Features(
        {
            image_column: datasets.Image(),
            "gender": datasets.ClassLabel(names=list(attributes)),
            "job": datasets.ClassLabel(names=list(JOBS)),
        }
    )
    columns = {
        image_column: [picture(row) for row in range(rows)],
        "gender": [row % len(attributes) for row in range(rows)],
        "job": [row // 2 % 2 for row in range(rows)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def text(gender, job="doctor"):
    return TEMPLATE.format(attribute=gender, job=job)


def same_pixels(first, second):
    return first.tobytes() == second.tobytes()


BUILT = {
    "reverse": lambda: reverse_attribute(people(), TEMPLATE, "gender", other_texts=["a photo"]),
    "keep": lambda: keep_attribute(people(), TEMPLATE, "gender"),
    "neutralize": lambda: neutralize_attribute(people(), TEMPLATE, "gender", other_texts=["a photo"]),
    "texts": lambda: neutralize_texts(people(), PAIRS),
    "several": lambda: neutralize_attribute(people(7, ("a", "b", "c")), TEMPLATE, "gender"),
}


@pytest.mark.parametrize("name", BUILT)
def test_rows_pass_the_checks_of_every_loss(name):
    check_preferences(BUILT[name](), None, ["sigmoid", "ipo", "kto_pair", "sft"])


def test_reversed_rows_reject_the_images_own_text_and_keep_its_other_words():
    dataset = people(5, image_column="face")
    rows = reverse_attribute(dataset, TEMPLATE, "gender", image_column="face")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (text("woman"), text("man")),
        (text("man"), text("woman")),
        (text("woman", "nurse"), text("man", "nurse")),
        (text("man", "nurse"), text("woman", "nurse")),
        (text("woman"), text("man")),
    ]
    assert all(same_pixels(row["image"], person["face"]) for row, person in zip(rows, dataset, strict=True))


def test_of_several_attributes_the_others_take_turns():
    rows = reverse_attribute(people(12, ("a", "b", "c")), "a {attribute}", "gender")
    assert Counter((row["rejected"], row["chosen"]) for row in rows) == {
        (f"a {own}", f"a {other}"): 2 for own in "abc" for other in "abc" if own != other
    }


def test_kept_rows_are_the_reversed_ones_turned_round():
    turned = keep_attribute(people(), TEMPLATE, "gender")
    rows = reverse_attribute(people(), TEMPLATE, "gender")
    assert [(row["rejected"], row["chosen"]) for row in turned] == [(row["chosen"], row["rejected"]) for row in rows]
    joined = datasets.concatenate_datasets([rows, turned.select_columns(rows.column_names)])
    assert len(joined) == 10


@pytest.mark.parametrize("attributes", [NAMES, ("a", "b", "c")])
def test_neutral_rows_choose_and_reject_each_text_once_an_image(attributes):
    dataset = people(5, attributes)
    rows = neutralize_attribute(dataset, TEMPLATE, "gender")
    assert len(rows) == 5 * len(attributes)
    for person in range(5):
        mine = [row for row in rows if same_pixels(row["image"], dataset[person]["image"])]
        texts = [text(name, JOBS[person // 2 % 2]) for name in attributes]
        assert sorted(row["chosen"] for row in mine) == sorted(texts) == sorted(row["rejected"] for row in mine)


def test_pairs_of_texts_take_turns_and_both_texts_are_chosen_once():
    dataset = people(4).remove_columns(["gender", "job"])
    rows = neutralize_texts(dataset, PAIRS, rounds=2)
    used = [PAIRS[number % 3] for number in range(8)]
    assert [(row["chosen"], row["rejected"]) for row in rows] == used + [(second, first) for first, second in used]
    assert all(same_pixels(rows[number]["image"], dataset[number % 4]["image"]) for number in range(16))


def test_other_texts_join_the_candidates_of_every_row():
    rows = reverse_attribute(people(), TEMPLATE, "gender", other_texts=["a photo of a dog"])
    assert rows[0]["candidates"] == [text("man"), text("woman"), "a photo of a dog"]


def test_strings_fill_a_template_and_names_of_ones_own_stand_for_labels():
    dataset = people(2).cast_column("gender", datasets.Value("int64")).remove_columns("job")
    dataset = dataset.add_column("job", ["chef", "judge"])
    rows = reverse_attribute(dataset, TEMPLATE, "gender", attribute_names=("boy", "girl"))
    assert rows["chosen"][:] == [text("girl", "chef"), text("boy", "judge")]


@pytest.mark.parametrize("missing", [None, -1])
def test_a_class_without_a_label_fills_no_template(missing):
    jobs = [0, missing, 1, 0, 1]
    rows = people().remove_columns("job").add_column("job", jobs, feature=datasets.ClassLabel(names=list(JOBS)))
    with pytest.raises(ValueError, match=r"Row 1: column 'job'.*drop the row"):
        reverse_attribute(rows, TEMPLATE, "gender")


def test_the_trainer_takes_them(clip_folder, tmp_path):
    args = ContrastivePOConfig(str(tmp_path), max_steps=1, reference_free=True, report_to=[], use_cpu=True)
    rows = BUILT["neutralize"]()
    trainer = ContrastivePOTrainer(str(clip_folder), args=args, train_dataset=rows, reg_dataset=people())
    assert trainer.train().global_step == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: reverse_attribute(people(), "a photo of a {}", "gender"), r"must contain '\{attribute\}'"),
        (lambda: reverse_attribute(people(), "a {attribute} at {place}", "gender"), "has a field 'place'"),
        (lambda: reverse_attribute(people(), "a {attribute", "gender"), "not a text with fields"),
        (lambda: reverse_attribute(people(), TEMPLATE, "sex"), "'sex' is not a column"),
        (lambda: reverse_attribute(people(1, ("man",)), TEMPLATE, "gender"), "two attributes or more"),
        (lambda: reverse_attribute(people(), "a {attribute}", "gender", ("one", "one")), "more than once"),
        (lambda: keep_attribute(people(), "a {attribute}", "gender", other_texts=["a man"]), "already"),
        (lambda: neutralize_attribute(people(0), TEMPLATE, "gender"), "is empty"),
        (lambda: neutralize_texts(people(), []), "text_pairs is empty"),
        (lambda: neutralize_texts(people(), ["ab"]), "must be a pair of texts"),
        (lambda: neutralize_texts(people(), [("a man", "a man")]), "already at position 0"),
        (lambda: neutralize_texts(people(2), PAIRS), "Set rounds to at least 2"),
    ],
)
def test_what_makes_no_preferences_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
