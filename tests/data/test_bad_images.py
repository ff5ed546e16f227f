"""Images that can't be read: their rows weigh nothing, are counted and named, and change nothing else."""

import io
import struct
import zlib

import datasets
import pytest
import torch
from PIL import Image
from samples import CLASSES, StopAt, make_labelled, make_preferences, picture, same, weights
from streaming_worker import BROKEN, with_broken
from tolerances import LOGPS

from clip_po.concept.transform import ConceptTransform
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.bad_images import SkippedRows
from clip_po.data.collator import RowMetadataCollator
from clip_po.data.pairs import PreferencePairs
from clip_po.data.streamed_pairs import StreamedPairs
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.validation import UnreadableImage

ATTACK = TypographicAttack(CLASSES, min_side=32)
RUN = {"learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1, "on_bad_image": "skip"}


def stored(kind, image=None):
    buffer = io.BytesIO()
    (image or picture(0)).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A small PNG that says it has 400 million pixels."""
    header = struct.pack(">II", 20_000, 20_000) + stored("PNG")[24:29]
    return stored("PNG")[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + stored("PNG")[33:]


BAD = {
    "no bytes": {"bytes": b"", "path": None},
    "no image": BROKEN,
    "no file": {"bytes": None, "path": "/nowhere/at/all.png"},
    "nothing": None,
    "cut off": {"bytes": stored("JPEG")[:300], "path": None},
    "a bomb": {"bytes": bomb(), "path": None},
    "a line": {"bytes": stored("PNG", Image.new("RGB", (500, 1))), "path": None},
}


def rows_of(kind, bad=BROKEN, bad_row=2, **arguments):
    """Five rows, of which one has an image that can't be read, by a way in which rows can come."""
    if kind in ("attack", "attacked stream"):
        broken = replaced(make_labelled(5), bad_row, bad, "image")
    else:
        broken = replaced(make_preferences(5), bad_row, bad, "image")
    if kind == "attack":
        broken = TypographicPreferences(broken, ATTACK)
    if kind in ("stream", "attacked stream"):
        stream = broken.to_iterable_dataset()
        stream = TypographicStream(stream, ATTACK) if kind == "attacked stream" else stream
        return StreamedPairs(stream, 1, 5, ["sigmoid"], regularization="clean_image", **arguments)
    return PreferencePairs(broken, "clean_image", **arguments)


def replaced(dataset, row, value, column):
    broken = with_broken(dataset, {row}, column)
    raw = {name: datasets.Image(decode=False) for name, f in broken.features.items() if isinstance(f, datasets.Image)}
    undecoded = broken.cast(datasets.Features({**broken.features, **raw})).to_list()
    undecoded[row][column] = value
    return datasets.Dataset.from_list(undecoded, features=broken.features)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", ["rows", "attack", "stream", "attacked stream"])
def test_a_row_without_its_image_weighs_nothing_and_says_why(kind, bad):
    pairs = rows_of(kind, bad, on_bad_image="skip")
    rows = [pairs[i] for i in range(5)]
    assert [row["weight"] for row in rows] == [1.0, 1.0, 0.0, 1.0, 1.0]
    # The clean image is the one that can't be read where the attack was to be drawn on it.
    assert [row["reg_row_weight"] for row in rows] == [1.0, 1.0, 0.0 if "attack" in kind else 1.0, 1.0, 1.0]
    assert [bool(row["skipped"]) for row in rows] == [False, False, True, False, False]
    assert "ow 2" in rows[2]["skipped"]
    assert "'image'" in rows[2]["skipped"]
    whole = rows_of(kind, {"bytes": stored("PNG"), "path": None}, on_bad_image="skip")[2]
    assert rows[2].keys() == whole.keys()
    assert (rows[2]["chosen"], rows[2]["rejected"]) == (whole["chosen"], whole["rejected"])
    pairs = rows_of(kind, bad)
    pairs[0], pairs[1]
    with pytest.raises(UnreadableImage, match=r"ow 2.*'image'"):
        pairs[2]


REGULARIZED = {
    "own": ("clean_image", None, (1.0, 0.0)),
    "own, as a target too": ("clean_image", "clean_image", (0.0, 0.0)),
    "a target": (None, "clean_image", (0.0, 0.0)),
    "unused": (None, None, (1.0, 0.0)),
}


@pytest.mark.parametrize("case", REGULARIZED.values(), ids=REGULARIZED)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_clean_image_counts_where_it_is_used(case, streamed):
    regularization, targets, weights = case
    rows = with_broken(make_preferences(3), {1}, "clean_image")
    arguments = {"regularization": regularization, "targets": targets, "on_bad_image": "skip"}
    if streamed:
        row = StreamedPairs(rows.to_iterable_dataset(), 1, 3, ["sft"], **arguments)[1]
    else:
        row = PreferencePairs(rows, **arguments)[1]
    assert (row["weight"], row["reg_row_weight"]) == weights
    assert bool(row["skipped"]) == (regularization is not None or targets is not None)
    assert row["image"].tobytes() == make_preferences(3)[1]["image"].tobytes()


def test_an_ordinary_image_of_another_data_set_costs_its_share_alone():
    pairs = PreferencePairs(make_preferences(4), with_broken(make_labelled(4), {2}), on_bad_image="skip")
    rows = [pairs[i] for i in range(4)]
    assert sorted(row["reg_row_weight"] for row in rows) == [0.0, 1.0, 1.0, 1.0]
    assert [row["weight"] for row in rows] == [1.0] * 4
    assert [row["skipped"] for row in rows if row["skipped"]] == [
        next(row["skipped"] for row in rows if not row["reg_row_weight"])
    ]
    assert "reg_dataset row 2" in next(row["skipped"] for row in rows if row["skipped"])


def test_padding_is_not_counted_and_errors_of_another_kind_are_not_skipped(monkeypatch):
    pairs = rows_of("rows", on_bad_image="skip")
    assert pairs[0, 5, 2]["skipped"] is None
    few = TypographicPreferences(make_labelled(4), TypographicAttack(["cat", "dog"], min_side=32))
    monkeypatch.setattr(few.attack.__class__, "written", lambda *_, **__: few.attack.check_words_left(["cat", "dog"]))
    with pytest.raises(ValueError, match="Give more words"):
        PreferencePairs(few, on_bad_image="skip")[0]


def test_rows_are_counted_over_processes_and_the_first_are_named(caplog):
    rows = SkippedRows()
    rows.add(["", "row 1", "", "row 3"])
    rows.add(["row 4", "row 5"])
    assert [record.getMessage().split(": ")[1] for record in caplog.records][:2] == ["row 1", "row 3"]
    assert len(caplog.records) == 3
    assert "only counted" in caplog.records[2].getMessage()
    double = {"reduce": lambda own: own * 2, "device": torch.device("cpu")}
    assert rows.pop(**double, fewest=1) == 8
    assert rows.pop(**double, fewest=1) == 0
    alone = SkippedRows()
    alone.add(["row 0"])
    alone.pop(**double, fewest=3)
    with pytest.raises(ValueError, match=r"All 2 rows so far were skipped .*row 0"):
        alone.pop(**double, fewest=2)


def test_what_rows_say_goes_past_any_collator():
    collate = RowMetadataCollator(lambda rows: {"keys": sorted({key for row in rows for key in row})})
    rows = [{"image": 1, "skipped": reason} for reason in ("", None, "row 1")]
    assert collate(rows) == {"keys": ["image"], "skipped": ["", "row 1"]}
    assert collate([{"image": 1}, {"image": 2, "stream_mark": "here"}]) == {"keys": ["image"], "stream_mark": "here"}


# ---- Training


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair", "distillation"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_the_loss_is_that_of_the_other_rows(loss_type, precomputed, make_trainer):
    rows = with_broken(with_broken(make_preferences(6), {1, 4}), {1, 4}, "clean_image")
    trainer = make_trainer(rows, loss_type=loss_type, precompute_ref_log_probs=precomputed, eval_dataset=rows)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    trainer.get_train_dataloader()
    pairs = trainer.train_dataset
    losses = {}
    for name, kept in {"all": range(6), "readable": (0, 2, 3, 5), "none": (1,)}.items():
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([pairs[i] for i in kept]))
        loss.backward()
        losses[name] = loss.item()
        gradients = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None]
        assert max(gradients) > 0 if name != "none" else max(gradients) == 0
    assert losses["none"] == 0
    assert losses["all"] == pytest.approx(losses["readable"], abs=LOGPS)
    assert trainer.evaluate()["eval_skipped_rows"] == 2


def test_a_run_around_broken_images_resumes_bit_for_bit_with_two_workers(make_trainer):
    def rows():
        return TypographicPreferences(with_broken(make_labelled(9), {1, 4}), ATTACK)

    settings = {"dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(rows(), folder="whole", **settings)
    whole.train()
    make_trainer(rows(), callbacks=[StopAt(2)], **settings).train()
    resumed = make_trainer(rows(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert all(value.isfinite().all() for value in weights(whole.model).values())
    counts = [log["skipped_rows"] for log in whole.state.log_history]
    assert sum(counts[:3]) == 2  # an epoch
    assert len(counts) == 5


def test_rows_that_come_as_embeddings_are_skipped_too(make_trainer, tmp_path):
    arguments = {"eval_dataset": make_preferences(3), "embeddings_cache": str(tmp_path / "cache")}
    rows = with_broken(make_preferences(6), {1, 4})
    trainer = make_trainer(
        rows, concept=ConceptTransform(16), reg_dataset=with_broken(make_labelled(3), {0}), **arguments
    )
    trainer.train()
    assert trainer.train_dataset.embedded
    assert [trainer.train_dataset[i]["weight"] for i in range(6)] == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert sorted(trainer.train_dataset[i]["reg_row_weight"] for i in range(3)) == [0.0, 1.0, 1.0]
    assert "train_dataset row 1" in trainer.train_dataset[1]["skipped"]
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    assert trainer.evaluate()["eval_skipped_rows"] == 1
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 1  # the evaluation's images alone are whole: what can't be read may be mended


def test_a_data_set_of_nothing_else_says_so(make_trainer):
    rows = with_broken(make_preferences(3), {0, 1, 2})
    with pytest.raises(ValueError, match="All 3 rows so far were skipped"):
        make_trainer(rows, precompute_ref_log_probs=False, max_steps=8).train()
    with pytest.raises(ValueError, match=r"None of the 3 images can be read. train_dataset row 0"):
        make_trainer(rows, precompute_ref_log_probs=True).train()
    with pytest.raises(ValueError, match="All 3 rows so far were skipped"):
        make_trainer(make_preferences(2)).evaluate(rows)


def test_by_default_training_stops_at_the_first(make_trainer):
    rows = with_broken(make_preferences(3), {1})
    with pytest.raises(UnreadableImage, match="train_dataset row 1"):
        make_trainer(rows, on_bad_image="raise").train()
    with pytest.raises(ValueError, match="on_bad_image must be 'raise' or 'skip', got 'ignore'"):
        make_trainer(rows, on_bad_image="ignore")
    assert "skipped" not in PreferencePairs(make_preferences(1))[0]
