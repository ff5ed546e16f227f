"""Whatever a decoder raises, one sentence names the image that can't be read; other faults are not taken for it."""

import datasets
import pytest
from PIL import Image
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture
from streaming_worker import with_broken
from torch.utils.data import DataLoader

from clip_po.candidates import CandidateTexts
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.embedding_cache import image_digest
from clip_po.data.formats import read_row
from clip_po.data.images import read_image, read_images
from clip_po.data.pairs import PreferencePairs
from clip_po.data.streamed_pairs import StreamedPairs
from clip_po.data.typographic_preferences import TypographicPreferences, TypographicStream
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.evaluation.zero_shot import zero_shot_accuracy
from clip_po.validation import UnreadableImage, unreadable_image

ATTACK = TypographicAttack(CLASSES, min_side=32)
TEXTS = CandidateTexts(PROMPTS)


def numbered(rows, **arguments):
    return PreferencePairs(rows, None, TEXTS, **arguments)


def attacked(rows, **arguments):
    return PreferencePairs(TypographicPreferences(rows, ATTACK), "clean_image", TEXTS, **arguments)


def regularized(rows, **arguments):
    return PreferencePairs(make_preferences(1), rows.select([2]), TEXTS, **arguments)


def streamed(rows, **arguments):
    stream = rows.to_iterable_dataset()
    stream = TypographicStream(stream, ATTACK) if "label" in rows.column_names else stream
    return StreamedPairs(stream, 1, 4, ["sigmoid"], None, TEXTS, **arguments)


WAYS = {
    "rows": (numbered, make_preferences, 2),
    "attack": (attacked, make_labelled, 2),
    "regularization": (regularized, make_labelled, 0),
    "stream": (streamed, make_preferences, 2),
    "attacked stream": (streamed, make_labelled, 2),
}
WORKERS = pytest.mark.parametrize("workers", [0, 1])


@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError, KeyError, AttributeError, RuntimeError, IndexError])
@pytest.mark.parametrize(("make", "rows", "bad"), WAYS.values(), ids=WAYS)
def test_every_error_of_a_decoder_means_an_unreadable_image(make, rows, bad, error, monkeypatch):
    broken = with_broken(rows(4), {2})
    decode = datasets.Image.decode_example

    def decoder(self, value, *args, **kwargs):
        if value["bytes"] == b"no image":
            raise error("exotic EXIF")
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", decoder)
    assert "exotic EXIF" in make(broken, on_bad_image="skip")[bad]["skipped"]
    pairs = make(broken)
    if make is streamed:
        pairs[0], pairs[1]
    with pytest.raises(UnreadableImage, match=f"'image' can't be read .{error.__name__}.*exotic EXIF"):
        pairs[bad]


def files(folder, rows=4):
    """Labelled images in files, one of them cut off."""
    paths = [folder / f"{number}.png" for number in range(rows)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    columns = {"image": [str(path) for path in paths], "label": [number % 4 for number in range(rows)]}
    return datasets.Dataset.from_dict(columns, features=make_labelled(1).features), str(paths[2])


@pytest.mark.parametrize("kind", ["attack", "regularization", "attacked stream"])
def test_a_cut_off_file_is_named_by_its_path(kind, tmp_path):
    rows, path = files(tmp_path)
    make, _, bad = WAYS[kind]
    said = make(rows, on_bad_image="skip")[bad]["skipped"]
    assert said.count(path) == 1
    stored = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": "in/an/archive"}]},
        features=rows.select_columns("image").features,
    )
    with pytest.raises(UnreadableImage, match="in/an/archive"):
        read_image(read_images(stored, "image"), "image", 0)


def test_a_missing_file_is_named_once(tmp_path):
    missing = str(tmp_path / "gone.png")
    rows = datasets.Dataset.from_dict({"image": [missing]}, features=make_labelled(1).select_columns("image").features)
    for read in (lambda: read_row(rows, 0, "reg_dataset"), lambda: image_digest(rows, "image")):
        with pytest.raises(UnreadableImage) as raised:
            read()
        assert str(raised.value).count(missing) == 1


@WORKERS
def test_one_sentence_without_the_traceback_of_a_worker(workers, tmp_path, make_trainer, model, processor):
    rows, path = files(tmp_path)
    images = RobustnessImages(rows, ATTACK, processor)
    trainer = make_trainer(
        TypographicPreferences(rows, ATTACK),
        dataloader_num_workers=workers,
        max_steps=1,
        precompute_ref_log_probs=False,
    )
    prompts = ["a photo of a {}"]
    for run in (
        trainer.train,
        lambda: list(DataLoader(images, num_workers=workers)),
        lambda: zero_shot_accuracy(model, processor, rows, prompts, num_workers=workers, disable_tqdm=True),
    ):
        with pytest.raises(UnreadableImage) as raised:
            run()
        said = str(raised.value)
        assert said.startswith(("Row 2: the image in column 'image'", "train_dataset row 2: the image"))
        assert path in said
        assert "\n" not in said
        assert "Traceback" not in said


def test_a_message_that_names_the_class_is_kept_whole():
    nested = unreadable_image(UnreadableImage("Row 0: gone."), "'image'", "Row 1")
    assert str(nested).startswith("Row 1: the image")
    assert "Row 0: gone." in str(nested)


# ---- What is no fault of an image


@pytest.mark.parametrize("index", [4, -5, 10**6])
def test_a_row_that_is_not_there_is_no_unreadable_image(index, processor):
    rows = make_labelled(4)
    with pytest.raises(IndexError, match=f"4 rows, so there is no row {index}"):
        read_image(read_images(rows, "image"), "image", index)
    with pytest.raises(IndexError, match=f"train_dataset has 4 rows, so there is no row {index}"):
        read_row(rows, index, "train_dataset")
    with pytest.raises(IndexError, match="no row"):
        numbered(make_preferences(4), on_bad_image="skip")[index]
    if index > 0:
        with pytest.raises(IndexError, match="no row"):
            RobustnessImages(rows, ATTACK, processor)[index]


@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError, KeyError, IndexError])
def test_an_error_in_a_transform_is_raised_as_it_is(error):
    def transform(batch):
        raise error("a fault of the transform")

    with pytest.raises(error, match="a fault of the transform"):
        numbered(make_preferences(4).with_transform(transform), on_bad_image="skip")[1]


@pytest.mark.parametrize("error", [OSError, Image.DecompressionBombError, SyntaxError])
def test_a_transform_that_opens_files_may_find_one_broken(error):
    def transform(batch):
        raise error("cut off")

    row = numbered(make_preferences(4).with_transform(transform), on_bad_image="skip")[1]
    assert "cut off" in row["skipped"]
