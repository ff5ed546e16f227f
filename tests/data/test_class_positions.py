"""Class names and positions: texts that belong to other classes, or to none, train or measure nothing silently."""

import datasets
import pytest
from samples import CLASSES, PROMPTS, make_trainer, picture

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.class_labels import read_labels
from clip_po.data.class_positions import misplaced_text
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import zero_shot_accuracy

SORTED = [f"a photo of a {name}" for name in sorted(CLASSES)]


@pytest.mark.parametrize(
    ("names", "texts", "found"),
    [
        (["cat", "dog"], ["a cat", "a dog"], None),
        (["cat", "dog"], ["a dog", "a cat"], (0, 1)),
        (["cat", "dog"], ["Dog.", "CAT,"], (0, 1)),
        (["polar_bear", "golden_retriever"], ["a golden retriever", "a polar bear"], (0, 1)),
        (["cat", "dog", "bird"], ["nothing", "a cat", "a dog"], (1, 0)),  # moved by one
        (["cat", "tiger cat"], ["a tiger cat", "a cat"], (0, 1)),  # one name is in the other
        (["husky", "dog"], ["a husky dog", "a dog"], None),
        (["dog", "husky"], ["a photo of a dog", "a husky dog"], None),
        (["tiger", "cat"], ["a big cat", "a cat"], None),  # renamed: the text of "cat" is its own
        (["0", "1"], ["zero", "one"], None),
        (["cat", "dog"], ["ein Bild einer Katze", "ein Bild eines Hundes"], None),
        (["cat", "dog"], ["categories", "dogma"], None),
        (["0", "1"], ["the digit 1", "the digit 0"], (0, 1)),
        (["c", "c++"], ["c++", "c"], (0, 1)),
    ],
)
def test_a_text_that_belongs_to_another_class_is_found(names, texts, found):
    assert misplaced_text(names, texts) == found


def test_a_thousand_classes_take_no_time():
    names = [f"class number {number}" for number in range(3000)]
    assert misplaced_text(names, [f"a photo of a {name}" for name in names]) is None
    assert misplaced_text(names, [*names[1:], names[0]]) is not None


def rows(label, rejected, names=CLASSES, rejected_names=None, several=False):
    rejected_feature = datasets.ClassLabel(names=rejected_names or names)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "clean_image": datasets.Image(),
            "label": datasets.ClassLabel(names=names),
            "rejected_label": datasets.List(rejected_feature) if several else rejected_feature,
        }
    )
    images = [picture(i) for i in range(len(label))]
    columns = {"image": images, "clean_image": images, "label": label, "rejected_label": rejected}
    return datasets.Dataset.from_dict(columns, features=features)


def trained(data, texts, tmp_path, clip_folder, **arguments):
    return make_trainer(clip_folder, tmp_path, train_dataset=data, candidate_texts=texts, **arguments)


KINDS = {
    "numbered": lambda data: {"train_dataset": data},
    "streamed": lambda data: {"train_dataset": data.to_iterable_dataset(), "max_steps": 1},
    "evaluation": lambda data: {"eval_dataset": {"far": data}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (
            SORTED,
            r"texts\[0\] is 'a photo of a bird', but class 0 of .*'cat'; .*order of the labels: \['cat'",
        ),
        ([*PROMPTS, "a lion", "a tiger"], "has 4 classes, but there are 6 candidate_texts.*Value"),
        (PROMPTS[:3], "has 4 classes, but there are 3 candidate_texts"),
    ],
    ids=["another-order", "more-texts", "fewer-texts"],
)
def test_candidates_that_are_not_those_of_the_labels_are_refused(texts, says, kind, clip_folder, tmp_path):
    arguments = KINDS[kind](rows([0, 1, 2], [1, 2, 0]))
    with pytest.raises(ValueError, match=says):
        make_trainer(clip_folder, tmp_path, **{"train_dataset": None, "candidate_texts": texts, **arguments})


def test_a_list_of_rejected_classes_is_compared_too(clip_folder, tmp_path):
    data = rows([0, 1], [[1], [2]], several=True).cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="column 'rejected_label' is 'cat'"):
        trained(data, SORTED, tmp_path, clip_folder)


def test_two_columns_of_different_classes_are_refused(clip_folder, tmp_path):
    data = rows([0, 1], [1, 2], rejected_names=["feline", "hound", "fowl", "boat"])
    with pytest.raises(ValueError, match=r"different class names.*the same datasets\.ClassLabel"):
        trained(data, PROMPTS, tmp_path, clip_folder)


@pytest.mark.parametrize("texts", [PROMPTS, [f"ein Bild {n}" for n in ("Katze", "Hund", "Vogel", "Schiff")]])
def test_candidates_in_the_order_of_the_labels_are_accepted(texts, clip_folder, tmp_path):
    trained(rows([0, 1, 2], [1, 2, 0]), texts, tmp_path, clip_folder)


def test_labels_without_names_may_have_any_candidates(clip_folder, tmp_path):
    data = rows([0, 1, 2], [1, 2, 0])
    for column in ("label", "rejected_label"):
        data = data.cast_column(column, datasets.Value("int64"))
    trained(data, [*SORTED, "a lion"], tmp_path, clip_folder)


def test_names_in_another_order_are_refused_with_the_order_to_use(labelled, processor, model):
    attack = TypographicAttack(words=CLASSES, min_side=32)
    wrong = ["Dog", "cat", "bird", "ship"]
    calls = [
        lambda: read_labels(labelled, "label", wrong),
        lambda: RobustnessImages(labelled, attack, processor, wrong),
        lambda: zero_shot_accuracy(model, processor, labelled, ["a {}"], wrong, disable_tqdm=True),
        lambda: TypographicPreferences(labelled, attack, wrong),
        lambda: TypographicStream(labelled.to_iterable_dataset(), attack, wrong),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"another order: 'Dog' is at position 0.*\['cat', 'dog', 'bird', 'ship'\]"
        ):
            call()
    assert read_labels(labelled, "label", ["Cat", "Dog", "Bird", "Ship"])[0][0] == "Cat"
