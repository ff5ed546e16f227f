"""Rows of a stream by number: the same rows and images as those of a data set, wherever reading starts."""

import json

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture

from clip_po.candidates import CandidateTexts
from clip_po.config import ContrastivePOConfig
from clip_po.data import stream_reader
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.pairs import PreferencePairs, checked_pairs
from clip_po.data.sampler import EpochSampler
from clip_po.data.stream_reader import StreamMark, StreamReader, digest
from clip_po.data.streamed_pairs import StreamedPairs, checked_stream
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.validation import UnreadableImage


def attack(**arguments):
    return TypographicAttack(**{"words": CLASSES, "min_side": 32, "seed": 5, **arguments})


def numbers(count=10, shards=3):
    return datasets.Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(num_shards=shards)


def slept(row):
    return {"n": row["n"] + 100}


STREAMS = {
    "plain": numbers,
    "shuffled shards": lambda: numbers().shuffle(seed=3, buffer_size=1),
    "shuffled in a buffer": lambda: numbers().shuffle(seed=3, buffer_size=4),
    "mapped": lambda: numbers().map(slept),
    "batched map": lambda: numbers().map(lambda rows: {"n": rows["n"]}, batched=True, batch_size=3),
    "filtered": lambda: numbers().filter(lambda row: row["n"] != 4),
    "taken and skipped": lambda: numbers().skip(1).take(7),
    "interleaved": lambda: datasets.interleave_datasets([numbers(), numbers(7).map(slept)], [0.5, 0.5], seed=1),
    "generated": lambda: datasets.IterableDataset.from_generator(lambda: ({"n": i} for i in range(9))),
}


def walk(reader, count):
    rows = [reader.take() for _ in range(count)]
    return [(row.values["n"], row.epoch, row.number, row.turn, row.padding) for row in rows]


def test_a_pass_follows_the_other_each_filled_up_to_whole_global_batches():
    rows = walk(StreamReader(numbers(5), 4, "data"), 16)
    assert [n for n, *_ in rows] == [0, 1, 2, 3, 4, 4, 4, 4] * 2
    assert [padding for *_, padding in rows] == [False] * 5 + [True] * 3 + [False] * 5 + [True] * 3
    assert [(epoch, number) for _, epoch, number, *_ in rows[8:13]] == [(1, n) for n in range(5)]
    assert [turn for *_, turn, _ in rows[8:13]] == [5, 6, 7, 8, 9]


def test_shuffling_differs_from_pass_to_pass_and_repeats_with_its_seed():
    rows = walk(StreamReader(STREAMS["shuffled in a buffer"](), 1, "data"), 20)
    assert sorted(n for n, *_ in rows[:10]) == sorted(n for n, *_ in rows[10:]) == list(range(10))
    assert [n for n, *_ in rows[:10]] != [n for n, *_ in rows[10:]]
    assert rows == walk(StreamReader(STREAMS["shuffled in a buffer"](), 1, "data"), 20)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("batches", [1, 3, 5, 6])
@pytest.mark.parametrize("sure", [3, 64])
def test_a_reader_goes_on_after_the_batch_of_a_mark(kind, batches, sure, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_reader, "MATCHING_ROWS", sure)  # with few rows a pass begins less long ago than that
    undisturbed = StreamReader(STREAMS[kind](), 4, "data")
    walk(undisturbed, 4 * batches - 2)  # the share of the first of two processes in the last batch
    undisturbed.mark().save(tmp_path)
    rest = walk(undisturbed, 2 + 20)[2:]
    resumed = StreamReader.resumed(STREAMS[kind](), 4, "data", StreamMark.load(tmp_path))
    while resumed.position < 4 * batches:
        resumed.take()
    assert walk(resumed, 20) == rest


def test_rows_before_a_mark_are_not_read_where_the_data_set_says_where_it_stands():
    read = []
    counted = numbers(400, shards=10).map(lambda row: read.append(row["n"]) or row)
    reader = StreamReader(counted, 4, "data")
    walk(reader, 302)
    mark, read[:] = reader.mark(), []
    resumed = StreamReader.resumed(counted, 4, "data", mark)
    assert read == list(range(192, 302))
    assert walk(resumed, 5) == walk(reader, 5)


@pytest.mark.parametrize("change", [lambda: numbers().shuffle(seed=4, buffer_size=4), lambda: numbers(6), numbers])
def test_another_stream_than_the_interrupted_one_is_refused(change):
    reader = StreamReader(STREAMS["shuffled in a buffer"](), 4, "train_dataset")
    walk(reader, 8)
    with pytest.raises(ValueError, match=r"train_dataset can't be resumed exactly: rows 0\.\.7 of its pass 0"):
        StreamReader.resumed(change(), 4, "train_dataset", reader.mark())


def test_a_state_that_is_no_json_is_left_out(tmp_path):
    StreamMark(4, 4, 0, 4, 7, state={"n": {1, 2}}).save(tmp_path)
    assert StreamMark.load(tmp_path) == StreamMark(4, 4, 0, 4, 7)
    assert json.loads((tmp_path / "stream.json").read_text())["state"] is None


def test_empty_streams_and_those_that_fail_are_named():
    with pytest.raises(ValueError, match="data is empty"):
        StreamReader(numbers().filter(lambda row: False), 4, "data").take()
    broken = StreamReader(numbers().map(lambda row: {"n": 1 / (row["n"] - 2)}), 4, "data")
    walk(broken, 2)
    with pytest.raises(ValueError, match=r"data row 2 of the stream .* the stream itself failed .ZeroDivisionError"):
        broken.take()


def test_a_digest_sees_every_column_and_byte():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "c": "x"}]
    rows += [{"image": {"bytes": b"12", "path": None}}, {"image": {"bytes": b"13", "path": None}}]
    rows += [{"image": picture(0)}, {"image": picture(1)}]
    assert len({digest(row) for row in rows}) == len(rows)
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest(rows[0], 1) != digest(rows[0], 2)


# ---- Preferences


def streamed(preferences, multiple=4, batches=8, **arguments):
    return StreamedPairs(preferences, batches, multiple, arguments.pop("loss_types", ["sigmoid"]), **arguments)


def sameness(row):
    images = {name: value.tobytes() for name, value in row.items() if isinstance(value, Image.Image)}
    return {**row, **images, "stream_mark": None}


def identity(rows):
    return rows


@pytest.mark.parametrize("regularization", [None, "clean_image", make_labelled(5).select_columns("image")])
@pytest.mark.parametrize("kind", ["rows", "attack", "others", "mapped"])
def test_rows_are_those_of_the_data_set_in_its_order(kind, regularization):
    if kind in ("attack", "others"):
        drawn = {"attack": attack(), "rejected": "word" if kind == "attack" else "others"}
        known = TypographicPreferences(make_labelled(6), **drawn)
        stream = TypographicStream(make_labelled(6).to_iterable_dataset(num_shards=2), **drawn)
        assert stream.candidate_texts == known.candidate_texts
    else:
        known = make_preferences(6)
        stream = known.to_iterable_dataset(num_shards=2)
        stream = stream.map(lambda row: row) if kind == "mapped" else stream
    by_number, by_turn = PreferencePairs(known, regularization), streamed(stream, regularization=regularization)
    sampler = EpochSampler(6, 4, seed=None)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for key in sampler:
            row = sameness(by_turn[8 * epoch + key[1]])
            wanted = sameness(by_number[key])
            names = wanted if wanted["weight"] else ["weight", "reg_row_weight"]
            assert {name: row[name] for name in names if name in row} == {
                name: wanted[name] for name in names if name in row
            }
            assert wanted.keys() - row.keys() <= {"clean_image"}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whoever_reads_them(workers):
    pairs = streamed(make_preferences(6).to_iterable_dataset().shuffle(seed=1, buffer_size=3))
    batches = [[(0, 4 * batch + place, 0) for place in range(4)] for batch in range(6)]
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=batches, num_workers=workers, collate_fn=identity)
    seen = [[sameness(row) for row in rows] for rows in loader]
    alone = streamed(make_preferences(6).to_iterable_dataset().shuffle(seed=1, buffer_size=3))
    assert seen == [[sameness(row) for row in alone.__getitems__(keys)] for keys in batches]
    half = streamed(make_preferences(6).to_iterable_dataset().shuffle(seed=1, buffer_size=3))
    assert [sameness(r) for keys in batches for r in half.__getitems__(keys[2:])] == [r for b in seen for r in b[2:]]


def test_classes_become_texts_and_images_keep_the_mode_of_their_column():
    rows = make_labelled(4).add_column("rejected_label", [1, 2, 3, 0])
    rows = rows.cast_column("image", datasets.Image(mode="L"))
    row = streamed(rows.to_iterable_dataset(), candidate_texts=CandidateTexts(PROMPTS))[0]
    assert (row["chosen"], row["rejected"]) == (PROMPTS[0], [PROMPTS[1]])
    assert row["image"].tobytes() == picture(0).convert("L").convert("RGB").tobytes()


WRONG_ROWS = {
    "same texts": ({"chosen": "a", "rejected": "a"}, {}, ["row 2 of the stream", "'chosen' and 'rejected' are both"]),
    "no rejected": (
        {"rejected": None},
        {"candidate_texts": CandidateTexts(["x", "y"])},
        ["row 2 of the stream", "no rejected text"],
    ),
    "several": (
        {"rejected": ["a", "b"]},
        {"loss_types": ["ipo"]},
        ["row 2 of the stream", "2 rejected texts", "one per row"],
    ),
    "weight": ({"weight": -1.0}, {}, ["row 2 of the stream", "'weight' must be"]),
    "unknown text": (
        {"chosen": "z"},
        {"candidate_texts": CandidateTexts(["x", "y"])},
        ["row 2 of the stream", "not among"],
    ),
    "broken image": ({"image": {"bytes": b"no", "path": None}}, {}, ["row 2 of the stream", "column 'image'"]),
    "no image": ({"image": None}, {}, ["row 2 of the stream", "column 'image'", "there is none"]),
}


@pytest.mark.parametrize("case", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_are_checked_as_they_come(case):
    change, arguments, parts = case
    good = {"image": {"bytes": None, "path": None}, "chosen": "x", "rejected": "y", "weight": 1.0}
    data = make_preferences(1).cast_column("image", datasets.Image(decode=False))
    rows = [{**good, "image": data[0]["image"]} for _ in range(4)]
    rows[2] = {**rows[2], **change}
    pairs = streamed(datasets.IterableDataset.from_generator(lambda: iter(rows)), **arguments)
    pairs[0], pairs[1]
    with pytest.raises(ValueError) as error:
        pairs[2]
    assert [part for part in [*parts, "train_dataset"] if part not in str(error.value)] == []
    assert isinstance(error.value, UnreadableImage) == ("image" in case[0])


@pytest.mark.parametrize(
    ("column", "value", "part"),
    [
        ("label", 4, "column 'label' is 4, expected a class number in 0..3"),
        ("confidence", -1.0, "column 'confidence' must be a finite number >= 0, got -1.0"),
    ],
)
def test_labels_and_weights_of_a_stream_are_checked_as_they_come(column, value, part):
    rows = make_labelled(3).cast_column("label", datasets.Value("int64")).add_column("confidence", [0.5] * 3)
    stream = rows.to_iterable_dataset().map(lambda row, i: {column: value} if i == 1 else {}, with_indices=True)
    pairs = streamed(TypographicStream(stream, attack(), CLASSES, weight_column="confidence"))
    assert pairs[0]["weight"] == 0.5
    with pytest.raises(ValueError) as error:
        pairs[1]
    assert part in str(error.value)
    assert "train_dataset row 1 of the stream" in str(error.value)


WRONG_STREAMS = {
    "no steps": (lambda s: s, {"max_steps": -1}, ["max_steps", "has no length"]),
    "precomputed": (lambda s: s, {"precompute_ref_log_probs": True}, ["precompute_ref_log_probs=True", "streamed"]),
    "cache": (lambda s: s, {"embeddings_cache": "x"}, ["embeddings_cache='x'", "streamed"]),
    "dropped": (lambda s: s, {"dataloader_drop_last": True}, ["dataloader_drop_last=True"]),
    "split": (lambda s: split_dataset_by_node(s, 0, 2), {}, ["split_dataset_by_node"]),
    "columns": (lambda s: s.rename_column("chosen", "better"), {}, ["has the columns"]),
    "rejected": (lambda s: s.remove_columns(["rejected"]), {}, ["no column 'rejected'"]),
    "ordinary images": (lambda s: s.remove_columns(["clean_image"]), {}, ["no column 'clean_image'"]),
    "paths": (lambda s: s.cast_column("image", datasets.Value("string")), {}, ["'image' must be datasets.Image()"]),
    "empty": (lambda s: datasets.IterableDataset.from_generator(lambda: iter(())), {}, ["is empty"]),
}


@pytest.mark.parametrize("case", WRONG_STREAMS.values(), ids=WRONG_STREAMS)
def test_unusable_streams_are_refused_at_the_start(case, tmp_path):
    change, arguments, parts = case
    args = ContrastivePOConfig(str(tmp_path), **{"max_steps": 2, **arguments})
    with pytest.raises(ValueError) as error:
        checked_stream(
            change(make_preferences(3).to_iterable_dataset()), None, CandidateTexts(), args, "train_dataset"
        )
    assert [part for part in [*parts, "train_dataset"] if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("dataset", "arguments", "part"),
    [
        (make_labelled(3), {}, "must be a datasets.IterableDataset, got Dataset"),
        (make_labelled(3).to_iterable_dataset(), {"label_column": "y"}, "no column 'y'"),
        (make_labelled(3).to_iterable_dataset(), {"class_names": ["a"]}, "has 4 classes, class_names has 1"),
        (make_labelled(3).to_iterable_dataset(), {"template": "x"}, "template must contain exactly one"),
        (make_labelled(3).cast_column("label", datasets.Value("int64")).to_iterable_dataset(), {}, "pass class_names"),
    ],
)
def test_unusable_labelled_streams_are_refused(dataset, arguments, part):
    with pytest.raises((ValueError, TypeError), match=part):
        TypographicStream(dataset, attack(), **arguments)


def test_the_class_for_rows_by_number_names_the_one_for_streams():
    with pytest.raises(TypeError, match="TypographicStream"):
        TypographicPreferences(make_labelled(2).to_iterable_dataset(), attack())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: TypographicStream(s, attack())])
def test_an_evaluation_is_not_streamed(wrap, tmp_path):
    args, stream = ContrastivePOConfig(str(tmp_path)), wrap(make_labelled(3).to_iterable_dataset())
    with pytest.raises(TypeError, match=r"eval_dataset is streamed, .*stream.take\(1000\)"):
        checked_pairs(stream, None, CandidateTexts(), args, "eval_dataset")
