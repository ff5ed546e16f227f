import datasets
import pytest
from samples import make_scenes

from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_images


@pytest.fixture(scope="module")
def dataset():
    return make_scenes()


def test_labels_come_with_their_names(dataset):
    names, labels = read_labels(dataset, "label", None)
    assert names == ("cat", "dog", "car")
    assert labels[:4].tolist() == [0, 1, 2, 0]
    assert read_labels(dataset, "label", ["feline", "hound", "automobile"])[0][0] == "feline"


def with_labels(values):
    return datasets.Dataset.from_dict({"label": values})


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([0, 1, 3], ["a", "b", "c"], r"Row 2: column 'label' is 3, expected a class number in 0\.\.2"),
        ([0, -1], ["a", "b"], "Row 1: column 'label' is -1"),
        ([0, None], ["a", "b"], "Row 1: column 'label' is None"),
        (["a"], ["a", "b"], "Row 0: column 'label' is 'a'"),
        ([True], ["a", "b"], "Row 0: column 'label' is True"),
        ([0], None, "pass class_names"),
    ],
)
def test_wrong_labels_are_named_by_row(values, names, message):
    with pytest.raises(ValueError, match=message):
        read_labels(with_labels(values), "label", names)


@pytest.mark.parametrize(
    ("column", "names", "message"),
    [
        ("class", None, r"label_column='class' is not a column.*'label'"),
        ("label", ["cat", "dog"], "has 3 classes, class_names has 2"),
        ("label", ["dog", "cat", "car"], "in another order"),
    ],
)
def test_names_that_contradict_the_column_are_refused(dataset, column, names, message):
    with pytest.raises(ValueError, match=message):
        read_labels(dataset, column, names)


def test_several_splits_are_refused(dataset):
    with pytest.raises(TypeError, match="DatasetDict; choose one"):
        read_labels(datasets.DatasetDict({"test": dataset}), "label", None)
    with pytest.raises(ValueError, match="image_column='photo'"):
        read_images(dataset, "photo")
