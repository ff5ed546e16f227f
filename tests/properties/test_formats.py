"""Rows for any texts: the two formats say the same, checks pass what is sound, and files keep what was written."""

import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import picture

from clip_po.candidates import CandidateTexts
from clip_po.data.formats import as_list, check_preferences, check_row, row_format, to_texts
from clip_po.data.loading import load_split
from clip_po.data.pairs import PreferencePairs

TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and text.isprintable())
CANDIDATES = st.lists(TEXTS, min_size=2, max_size=6, unique=True)
WEIGHTS = st.floats(0, 1e6)


@st.composite
def classes(draw):
    """Candidate texts, and rows of classes among them: label, several rejected ones, weight."""
    texts = draw(CANDIDATES)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        label, *rejected = draw(st.permutations(range(len(texts))))
        rejected = rejected[: draw(st.integers(1, len(rejected)))]
        rows.append({"label": label, "rejected_label": rejected, "weight": draw(WEIGHTS)})
    return texts, rows


def in_texts(texts, row):
    """The same preference, said in texts."""
    rejected = [texts[label] for label in as_list(row["rejected_label"])]
    return {"chosen": texts[row["label"]], "rejected": rejected, "weight": row["weight"]}


@given(classes())
def test_classes_and_texts_say_the_same(drawn):
    texts, rows = drawn
    for row in rows:
        check_row(row, texts, ["sigmoid"], "row")
        said = to_texts(row, texts)
        expected = in_texts(texts, row)
        check_row(expected, texts, ["sigmoid"], "row")
        assert {name: said[name] for name in expected} == to_texts(expected, texts) == expected
        assert to_texts(said, texts) == said  # once in texts, a row stays as it is
        alone = {**row, "rejected_label": row["rejected_label"][0]}
        assert to_texts(alone, texts)["rejected"] == expected["rejected"][:1]


@given(classes(), st.data())
def test_a_row_that_contradicts_itself_is_refused_in_either_format(drawn, data):
    texts, rows = drawn
    row = data.draw(st.sampled_from(rows))
    wrong = {**row, "rejected_label": [*row["rejected_label"], row["label"]]}
    for refused in (wrong, in_texts(texts, wrong)):
        with pytest.raises(ValueError, match=r"row: columns .* are both"):
            check_row(refused, texts, ["sigmoid"], "row")
    outside = data.draw(st.one_of(st.integers(max_value=-1), st.integers(min_value=len(texts))))
    with pytest.raises(ValueError, match="row: column 'label' is"):
        check_row({**row, "label": outside}, texts, ["sigmoid"], "row")


def dataset(texts, rows, kind):
    """Rows as a data set with pictures, of classes or of texts."""
    value = datasets.Value("string") if kind == "image-preference" else datasets.Value("int64")
    chosen, rejected = ("chosen", "rejected") if kind == "image-preference" else ("label", "rejected_label")
    features = {
        "image": datasets.Image(),
        "clean_image": datasets.Image(),
        chosen: value,
        rejected: datasets.List(value),
        "weight": datasets.Value("float64"),
    }
    said = [in_texts(texts, row) if kind == "image-preference" else row for row in rows]
    pictures = [{"image": picture(2 * i), "clean_image": picture(2 * i + 1)} for i in range(len(rows))]
    listed = [{**images, **row} for images, row in zip(pictures, said, strict=True)]
    return datasets.Dataset.from_list(listed, features=datasets.Features(features))


@settings(max_examples=8)
@given(classes(), st.sampled_from(["image-preference", "class-preference"]), st.sampled_from(["disk", "parquet"]))
def test_files_keep_rows_and_pixels(drawn, kind, storage):
    texts, rows = drawn
    written = dataset(texts, rows, kind)
    with tempfile.TemporaryDirectory() as folder:
        if storage == "disk":
            written.save_to_disk(folder)
            read = load_split(folder, "train")
        else:
            written.to_parquet(Path(folder, "train.parquet"))
            read = datasets.Dataset.from_parquet(str(Path(folder, "train.parquet")), cache_dir=folder)
        assert row_format(read.column_names) == kind
        check_preferences(read, texts, ["sigmoid"])
        assert read.features == written.features
        found = PreferencePairs(read, "clean_image", CandidateTexts(texts))
        for index, row in enumerate(rows):
            expected, back = in_texts(texts, row), found[index]
            assert {name: back[name] for name in expected} == expected
            assert back["image"].tobytes() == picture(2 * index).tobytes()
            assert back["reg_image"].tobytes() == picture(2 * index + 1).tobytes()
