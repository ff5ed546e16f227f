"""Training on streams: as on the same rows by number, resumed bit for bit, and dealt to processes without loss."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import streaming_worker
import torch
from samples import CLASSES, StopAt, make_labelled, make_preferences, same
from tolerances import LOGPS, RUNS

from clip_po.concept.transform import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.stream_reader import STREAM_FILE, StreamMark
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.training.stream_position import StreamPositionCallback

ATTACK = TypographicAttack(CLASSES, min_side=32)
RUN = {"per_device_train_batch_size": 3, "learning_rate": 1e-3, "max_steps": 9, "logging_steps": 1}


def logs(trainer, *without):
    kept = [{name: value for name, value in log.items() if name not in without} for log in trainer.state.log_history]
    return kept[:-1]  # the last says how fast it was


def shuffled(seed=0):
    return TypographicStream(make_labelled(8).to_iterable_dataset(num_shards=2).shuffle(seed, buffer_size=4), ATTACK)


@pytest.mark.parametrize("kind", ["attack", "preferences"])
def test_a_stream_trains_as_the_same_rows_by_number(kind, make_trainer):
    if kind == "attack":
        known, data = TypographicPreferences(make_labelled(8), ATTACK), {"loss_type": ["sigmoid", "distillation"]}
        stream = TypographicStream(make_labelled(8).to_iterable_dataset(), ATTACK)
    else:
        known, data = make_preferences(8), {"reg_dataset": make_labelled(5), "loss_type": "kto_pair"}
        stream = known.to_iterable_dataset()
    settings = {**data, "precompute_ref_log_probs": False}
    by_number = make_trainer(known, train_sampling_strategy="sequential", **settings)
    by_turn = make_trainer(stream, **settings)
    for trainer in (by_number, by_turn):
        trainer.train()
    assert len(logs(by_turn)) == 9
    assert logs(by_turn, "epoch") == logs(by_number, "epoch")
    assert same(by_turn.model.state_dict(), by_number.model.state_dict())


@pytest.mark.parametrize(("workers", "stopped_at"), [(0, 3), (2, 1)])
def test_a_run_on_a_stream_resumes_bit_for_bit(workers, stopped_at, make_trainer):
    settings = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers, "max_steps": 5}
    saved = {"save_strategy": "steps", "save_steps": stopped_at}
    streams = {0: shuffled, 2: lambda: make_preferences(8).to_iterable_dataset(num_shards=2)}
    whole = make_trainer(streams[workers](), **settings)
    whole.train()
    make_trainer(streams[workers](), callbacks=[StopAt(stopped_at)], **settings, **saved).train()
    resumed = make_trainer(streams[workers](), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert logs(resumed) == logs(whole)


def test_a_stream_that_gives_other_rows_is_not_resumed_unless_told_so(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(shuffled(), callbacks=[StopAt(2)], **settings).train()
    with pytest.raises(ValueError, match=r"train_dataset can't be resumed exactly: .*ignore_data_skip=True"):
        make_trainer(shuffled(seed=1), **settings).train(resume_from_checkpoint=True)
    anyway = make_trainer(shuffled(seed=1), ignore_data_skip=True, **settings)
    anyway.train(resume_from_checkpoint=True)
    assert anyway.state.global_step == 4
    (tmp_path / "run" / "checkpoint-2" / STREAM_FILE).unlink()  # as if another program had written it
    read_again = make_trainer(shuffled(), **settings)
    read_again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    whole = make_trainer(shuffled(), max_steps=4)
    whole.train()
    assert same(whole.model.state_dict(), read_again.model.state_dict())


def test_what_a_stream_cannot_do_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(shuffled(), max_steps=-1)
    with pytest.raises(ValueError, match="train_dataset is streamed, but a concept's"):
        make_trainer(shuffled(), concept=ConceptTransform(16))
    trainer = make_trainer(shuffled(), max_steps=1)
    with pytest.raises(TypeError, match="eval_dataset is streamed"):
        trainer.evaluate(make_preferences(2).to_iterable_dataset())
    broken = make_preferences(4).cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
    broken = broken.map(lambda row, i: {"image": {"bytes": b"no", "path": None}} if i == 1 else {}, with_indices=True)
    with pytest.raises(ValueError, match="train_dataset row 1 of the stream: the image in column 'image'"):
        make_trainer(broken).train()


@pytest.mark.parametrize("digests", [[5, 5], [5, 6]])
def test_processes_that_read_other_rows_are_stopped(digests):
    two = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.tensor(digests))
    refused = pytest.raises(ValueError, match=r"The processes read different rows .*stream\.shuffle\(seed=0\)")
    with refused if digests[0] != digests[1] else contextlib.nullcontext():
        StreamPositionCallback().follow(StreamMark(agreed=5), two)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder, two_processes):
    """The logs of one process and of two, and what the two wrote."""
    folder = tmp_path_factory.mktemp("streams")
    said = two_processes.run(Path(streaming_worker.__file__), clip_folder, folder)
    return streaming_worker.run(clip_folder, folder), json.loads((folder / "two.json").read_text()), said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stream", "rows", "apart"])
def test_two_processes_train_as_one_on_streams_and_around_broken_images(name, runs):
    one, two, _ = runs
    assert len(one[name]) == len(two[name]) == (8 if name == "rows" else 7)
    for first, second in zip(one[name], two[name], strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if "accuracies" not in key and not any(part in key for part in ("runtime", "per_second", "preparation")):
                assert second[key] == pytest.approx(value, rel=RUNS, abs=LOGPS), key
    counts = [log["skipped_rows"] for log in two[name] if "skipped_rows" in log]
    broken = {"stream": (3, 3), "rows": (3, 3), "apart": (5, 5)}[name]
    assert (sum(counts[:3]), sum(counts[3:])) == broken


@pytest.mark.slow
def test_what_two_processes_skip_is_said_by_the_one_that_read_it(runs):
    assert "Skipped, by on_bad_image='skip': train_dataset row 1: the image in column 'image' can't be read" in runs[2]
