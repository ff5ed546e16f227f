import datasets
import pytest
from PIL import Image
from samples import make_scenes

from clip_po.data.class_labels import read_labels
from clip_po.data.images import read_image, read_images
from clip_po.evaluation.zero_shot import zero_shot_accuracy


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


def test_an_unreadable_image_names_row_and_column(dataset, model, processor):
    rows = [{"path": None, "bytes": b"no image"} if row == 2 else image for row, image in enumerate(dataset["image"])]
    broken = datasets.Dataset.from_dict(
        {"image": rows[:4], "label": [0, 1, 2, 0]}, features=dataset.select_columns(["image", "label"]).features
    )
    assert read_image(read_images(broken, "image"), "image", 0).size == (28, 20)
    with pytest.raises(ValueError, match=r"Row 2: the image in column 'image' can't be read \(UnidentifiedImageError"):
        zero_shot_accuracy(model, processor, broken, ["a photo of a {}"], disable_tqdm=True)


def test_a_gap_and_a_path_are_no_images(dataset):
    gap = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="Row 0: column 'image' holds no image"):
        read_image(read_images(gap, "image"), "image", 0)
    paths = datasets.Dataset.from_dict({"image": ["a.png"]})
    with pytest.raises(ValueError, match=r"holds str, expected an image.*cast_column"):
        read_image(read_images(paths, "image"), "image", 0)


def test_images_are_rgb(dataset):
    grey = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (4, 4))]}, features=datasets.Features({"image": datasets.Image()})
    )
    assert read_image(read_images(grey, "image"), "image", 0).mode == "RGB"
