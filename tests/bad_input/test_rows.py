"""Columns, types and values of rows, candidate texts and labels: refused with row, column and remedy."""

import datasets
import pytest
from bad_input.table import INF, NAN, case, check, labelled, preferences
from samples import CLASSES, PROMPTS, make_labelled, make_preferences

from clip_po.concept.preferences import reverse_attribute
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import zero_shot_accuracy

CAT, DOG, BIRD, SHIP = PROMPTS
TEMPLATE = ["a photo of a {}"]


def classes(label, rejected):
    rows = preferences(chosen=None, rejected=None)
    return rows.add_column("label", label).add_column("rejected_label", rejected)


def attack(**arguments):
    return TypographicAttack(**{"words": CLASSES, "min_side": 32, **arguments})


def drawn(rows=None, **arguments):
    return TypographicPreferences(make_labelled(4) if rows is None else rows, attack(), **arguments)


def zero_shot(bench, rows=None, templates=TEMPLATE, **arguments):
    rows = make_labelled(4) if rows is None else rows
    return zero_shot_accuracy(bench.model, bench.processor, rows, templates, disable_tqdm=True, **arguments)


PREFERENCES = {
    "no-dataset": case(
        lambda b: b.trainer([{"image": 1}]), TypeError, "train_dataset must be a datasets.Dataset", "list", "from_list"
    ),
    "several-splits": case(
        lambda b: b.trainer(datasets.DatasetDict({"train": make_preferences(2)})), TypeError, "DatasetDict"
    ),
    "empty": case(lambda b: b.trainer(make_preferences(2).select([])), ValueError, "train_dataset is empty"),
    "no-column-of-texts": case(
        lambda b: b.trainer(preferences(chosen=None)), ValueError, "has the columns", "rename_column"
    ),
    "no-column-of-rejected-texts": case(
        lambda b: b.trainer(preferences(rejected=None)), ValueError, "no column 'rejected'", "['sigmoid'] needs"
    ),
    "no-clean-images": case(
        lambda b: b.trainer(preferences(clean_image=None)), ValueError, "no column 'clean_image'", "reg_dataset=..."
    ),
    "no-targets": case(
        lambda b: b.trainer(preferences(clean_image=None), loss_type="distillation", reg_weight=0.0),
        ValueError,
        "no column 'clean_image'",
        "leave the loss out",
    ),
    "images-are-paths": case(
        lambda b: b.trainer(preferences(image=["a.png"] * 4)), ValueError, "column 'image'", "cast_column('image'"
    ),
    "texts-are-numbers": case(
        lambda b: b.trainer(preferences(chosen=[1, 2, 3, 4])), ValueError, "column 'chosen' must be a string", "int64"
    ),
    "weights-are-texts": case(
        lambda b: b.trainer(preferences(weight=["1"] * 4)), ValueError, "column 'weight' must be a number", "string"
    ),
    "text-is-missing": case(
        lambda b: b.trainer(preferences(chosen=[CAT, None, CAT, CAT], rejected=[DOG] * 4)),
        ValueError,
        "train_dataset row 1: column 'chosen'",
        "None",
        "drop the row",
    ),
    "text-is-blank": case(
        lambda b: b.trainer(preferences(chosen=[CAT] * 4, rejected=[DOG, DOG, " ", DOG])),
        ValueError,
        "row 2: column 'rejected'",
        "' '",
        "Fill it in",
    ),
    "same-text-twice": case(
        lambda b: b.trainer(preferences(chosen=[CAT] * 4, rejected=[DOG, DOG, DOG, CAT])),
        ValueError,
        "row 3: columns 'chosen' and 'rejected'",
        CAT,
        "Drop the row",
    ),
    "rejected-list-is-empty": case(
        lambda b: b.trainer(preferences(chosen=[CAT] * 4, rejected=[[DOG], [], [DOG], [DOG]])),
        ValueError,
        "row 1: column 'rejected' has no rejected text",
        "fill it in",
    ),
    "several-rejected-for-ipo": case(
        lambda b: b.trainer(preferences(chosen=[CAT] * 4, rejected=[[DOG, BIRD]] * 4), loss_type="ipo"),
        ValueError,
        "row 0: column 'rejected' has 2 rejected texts",
        "S-DPO",
    ),
    "text-is-no-candidate": case(
        lambda b: b.trainer(preferences(chosen=["a lion", *[CAT] * 3], rejected=[DOG] * 4)),
        ValueError,
        "row 0: column 'chosen' is 'a lion'",
        "Add it to candidate_texts",
    ),
    "text-is-spelled-otherwise": case(
        lambda b: b.trainer(preferences(chosen=["a  Photo of a cat", *[CAT] * 3], rejected=[DOG] * 4)),
        ValueError,
        "row 0: column 'chosen' is 'a  Photo of a cat'",
        f"Write it as there, {CAT!r}",
    ),
    "weight-is-negative": case(
        lambda b: b.trainer(preferences(weight=[1.0, 1.0, -1.0, 1.0])), ValueError, "row 2: column 'weight'", "-1.0"
    ),
    "weight-is-nan": case(
        lambda b: b.trainer(preferences(weight=[1.0, NAN, 1.0, 1.0])), ValueError, "row 1: column 'weight'", "nan"
    ),
    "weight-is-infinite": case(
        lambda b: b.trainer(preferences(weight=[INF, 1.0, 1.0, 1.0])), ValueError, "row 0", "inf", "Fix it"
    ),
    "label-is-no-class": case(
        lambda b: b.trainer(classes([0, 1, 2, 4], [1, 2, 3, 0])), ValueError, "row 3: column 'label' is 4", "0..3"
    ),
    "label-is-unknown": case(
        lambda b: b.trainer(classes([0, 1, 2, -1], [1, 2, 3, 0])), ValueError, "row 3", "-1", "drop the row"
    ),
    "labels-without-candidates": case(
        lambda b: b.trainer(classes([0] * 4, [1] * 4), candidate_texts=None), ValueError, "no candidate_texts", "Pass"
    ),
    "own-candidates-lack-the-chosen": case(
        lambda b: b.trainer(
            preferences(chosen=[CAT] * 4, rejected=[DOG] * 4, candidates=[[DOG, BIRD]] * 4), candidate_texts=None
        ),
        ValueError,
        "row 0: column 'chosen'",
        "not among the candidate texts",
    ),
    "own-candidates-hold-a-gap": case(
        lambda b: b.trainer(
            preferences(chosen=[CAT] * 4, rejected=[DOG] * 4, candidates=[[CAT, DOG, None]] * 4), candidate_texts=None
        ),
        TypeError,
        "row 0: column 'candidates'[2] must be a string, got None",
    ),
    "regularization-without-images": case(
        lambda b: b.trainer(reg_dataset=make_labelled(2).rename_column("image", "img")), ValueError, "'image'", "img"
    ),
    "evaluation-is-named": case(
        lambda b: b.trainer(eval_dataset={"far": make_preferences(2).select([])}), ValueError, "eval_dataset['far']"
    ),
}

CANDIDATES = {
    "one": case(lambda b: b.trainer(candidate_texts=[CAT]), ValueError, "at least two texts", "always 1"),
    "one-text": case(lambda b: b.trainer(candidate_texts=CAT), ValueError, "candidate_texts must be a list", CAT),
    "a-set": case(lambda b: b.trainer(candidate_texts={CAT, DOG}), TypeError, "got set", "sorted(texts)"),
    "a-generator": case(lambda b: b.trainer(candidate_texts=iter(PROMPTS)), TypeError, "iterator", "Give a list"),
    "a-number": case(lambda b: b.trainer(candidate_texts=[CAT, 3]), TypeError, "candidate_texts[1]", "3"),
    "empty-text": case(lambda b: b.trainer(candidate_texts=[CAT, ""]), ValueError, "candidate_texts[1] is empty"),
    "twice": case(
        lambda b: b.trainer(candidate_texts=[CAT, DOG, CAT]), ValueError, "candidate_texts[2]", "position 0"
    ),
}

LABELLED = {
    "no-such-column": case(lambda b: drawn(label_column="class"), ValueError, "label_column='class'", "'label'"),
    "label-out-of-range": case(
        lambda b: drawn(labelled(label=[0, 1, 9, 1]), class_names=CLASSES),
        ValueError,
        "Row 2: column 'label' is 9",
        "0..3",
    ),
    "label-missing": case(
        lambda b: drawn(labelled(label=[0, None, 1, 1]), class_names=CLASSES),
        ValueError,
        "Row 1",
        "None",
        "drop the row",
    ),
    "label-is-text": case(
        lambda b: drawn(labelled(label=["cat"] * 4)), ValueError, "without names", "class_encode_column('label')"
    ),
    "too-few-names": case(lambda b: drawn(class_names=["cat", "dog"]), ValueError, "has 4 classes", "2 names"),
    "name-twice": case(
        lambda b: drawn(class_names=["cat", "dog", "bird", "Dog"]),
        ValueError,
        "['dog', 'Dog'] for the classes [1, 3]",
        "Rename",
        "An evaluation accepts",
    ),
    "name-is-a-number": case(lambda b: drawn(class_names=[1, 2, 3, 4]), ValueError, "class_names[0]", "got 1", "Name"),
    "template-without-place": case(lambda b: drawn(template="a photo"), ValueError, "template", "'{}'", "a photo"),
    "template-is-a-list": case(lambda b: drawn(template=TEMPLATE), TypeError, "template", "['a photo of a {}']"),
    "attack-is-a-list": case(
        lambda b: TypographicPreferences(make_labelled(4), CLASSES),
        TypeError,
        "attack must be a TypographicAttack",
        "['cat'",
    ),
    "weight-out-of-range": case(
        lambda b: drawn(labelled(sure=[1.0, 0.5, -1.0, 1.0]), weight_column="sure"),
        ValueError,
        "Row 2: column 'sure' must be a finite number >= 0, got -1.0",
    ),
    "attribute-without-names": case(
        lambda b: reverse_attribute(labelled(), "a photo", "label"), ValueError, "template must contain '{attribute}'"
    ),
}

ATTACK = {
    "words-are-numbers": case(lambda b: attack(words=[1, 2]), TypeError, "words must be a list of texts", "1"),
    "words-are-missing": case(lambda b: attack(words=None), TypeError, "words must be a list of texts", "None"),
    "other-words-are-a-text": case(lambda b: attack(other_words="cat"), TypeError, "other_words", "'cat'"),
    "size-is-one-number": case(lambda b: attack(size=0.3), TypeError, "size must be two numbers", "0.3"),
    "size-is-nan": case(lambda b: attack(size=(0.3, NAN)), ValueError, "size must be a finite number", "nan"),
    "count-is-a-fraction": case(lambda b: attack(count=(1, 1.5)), TypeError, "count must be a whole number", "1.5"),
    "side-is-text": case(lambda b: attack(min_side="224"), TypeError, "min_side", "'224' (str)", "input size"),
    "sticker-is-text": case(lambda b: attack(sticker="yes"), TypeError, "sticker must be a finite number", "'yes'"),
    "font-is-missing": case(lambda b: attack(fonts=["no.ttf"]), ValueError, "fonts: 'no.ttf'", "pillow"),
}

EVALUATION = {
    "template-is-a-number": case(lambda b: zero_shot(b, templates=[3]), TypeError, "templates[0] must be", "3"),
    "template-is-a-text": case(lambda b: zero_shot(b, templates="a {}"), ValueError, "templates must be a list"),
    "no-rows": case(lambda b: zero_shot(b, make_labelled(4).select([])), ValueError, "no rows", "at least one image"),
    "no-batch": case(lambda b: zero_shot(b, batch_size=0), ValueError, "batch_size must be a whole number >= 1", "0"),
    "workers-are-negative": case(lambda b: zero_shot(b, num_workers=-1), ValueError, "num_workers", "got -1"),
    "names-are-numbers": case(lambda b: zero_shot(b, class_names=[1, 2, 3, 4]), ValueError, "class_names[0]", "1"),
    "labels-of-robustness": case(
        lambda b: RobustnessImages(labelled(label=[0, 1, 2, 7]), attack(), b.processor, CLASSES),
        ValueError,
        "Row 3: column 'label' is 7",
    ),
}

CASES = {
    f"{table}-{name}": found
    for table, cases in {
        "preferences": PREFERENCES,
        "candidates": CANDIDATES,
        "labelled": LABELLED,
        "attack": ATTACK,
        "evaluation": EVALUATION,
    }.items()
    for name, found in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_that_cannot_be_used_is_refused(name, bench):
    check(CASES[name], bench)
