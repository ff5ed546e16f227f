import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from samples import CLASSES, make_labelled
from torch.utils.data import DataLoader

from clip_po.baselines.text_removal import TextRemoval, processor_without_text
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.images import to_pixels
from clip_po.evaluation.robustness import RobustnessImages
from clip_po.models import image_size

ATTACK = TypographicAttack(words=CLASSES, size=(0.25, 0.25), places=["bottom"], rotation=(0, 0), sticker=0.0)


@pytest.fixture
def detector():
    pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def landscape():
    """Return an image of 224 pixels with sky above land, in which nothing looks like a letter."""
    rows = np.linspace([90, 150, 220], [70, 110, 50], 224)
    return Image.fromarray(np.repeat(rows[:, None], 224, axis=1).astype(np.uint8))


def changed(first, second):
    return (np.asarray(first) != np.asarray(second)).any(axis=2)


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("word", ["bird", "ship"])
def test_a_drawn_word_is_removed(landscape, word):
    attacked = ATTACK.draw(landscape, word, 0)
    removal = TextRemoval()
    (polygon,) = removal.find(attacked)
    ink = changed(attacked, landscape)
    rows, columns = np.nonzero(ink)
    xs, ys = zip(*polygon, strict=True)
    assert min(xs) <= columns.min() + 2
    assert max(xs) >= columns.max() - 2
    assert min(ys) <= rows.min() + 2
    assert max(ys) >= rows.max() - 2

    removed = removal(attacked)
    left = np.abs(np.asarray(removed, dtype=int) - np.asarray(landscape, dtype=int))
    assert left.mean() < 0.2 * np.abs(np.asarray(attacked, dtype=int) - np.asarray(landscape, dtype=int)).mean()
    assert removal.find(removed) == []
    # Nothing changes away from the word.
    assert not changed(removed, attacked)[: rows.min() - 30].any()
    assert removal(attacked).tobytes() == removed.tobytes()


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("side", [32, 224])
def test_an_image_without_text_does_not_change(landscape, side):
    image = landscape.resize((side, side))
    assert TextRemoval()(image) is image


@pytest.mark.usefixtures("detector")
def test_a_small_image_is_enlarged_and_a_large_one_reduced(landscape):
    small = ATTACK.draw(landscape, "bird", 0).resize((48, 48), Image.Resampling.BICUBIC)
    assert len(TextRemoval().find(small)) == 1
    wide = Image.new("RGB", (1600, 224), "white")
    wide.paste(ATTACK.draw(landscape, "bird", 0), (800, 0))
    (polygon,) = TextRemoval(max_side=800).find(wide)
    assert all(800 < x < 1024 for x, _ in polygon)


@pytest.mark.usefixtures("detector")
def test_an_area_above_the_largest_share_is_not_text(landscape):
    attacked = ATTACK.draw(landscape, "bird", 0)
    assert TextRemoval(max_share=0.05)(attacked) is attacked


@pytest.mark.usefixtures("detector")
def test_a_processor_removes_text_before_processing(processor, landscape):
    attacked, removal = ATTACK.draw(landscape, "bird", 0), TextRemoval()
    changed_processor = processor_without_text(processor, removal)
    expected = to_pixels(processor, [removal(attacked), landscape])
    assert torch.equal(to_pixels(changed_processor, [attacked, landscape]), expected)
    assert torch.equal(changed_processor.image_processor(attacked, return_tensors="pt")["pixel_values"], expected[:1])
    assert not torch.equal(to_pixels(processor, [attacked]), expected[:1])
    assert image_size(changed_processor) == image_size(processor)
    assert changed_processor.tokenizer is processor.tokenizer


@pytest.mark.usefixtures("detector")
def test_a_processor_that_removes_text_works_in_workers(processor):
    removing = pickle.loads(pickle.dumps(processor_without_text(processor, TextRemoval())))
    images = RobustnessImages(make_labelled(4), ATTACK, removing)
    (batch,) = DataLoader(images, batch_size=4, num_workers=1)
    assert torch.equal(batch["typographic"], torch.stack([images[index]["typographic"] for index in range(4)]))


def test_creating_a_processor_does_not_need_the_detector(processor):
    assert image_size(processor_without_text(processor, TextRemoval())) == 32


def test_without_the_extra_the_error_names_what_to_install():
    code = (
        "import sys; sys.modules['rapidocr'] = None\n"
        "from PIL import Image\n"
        "from clip_po.baselines.text_removal import TextRemoval\n"
        "TextRemoval()(Image.new('RGB', (32, 32)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Text removal needs a text detector: pip install 'clip_po[ocr]'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_side": 16}, "min_side and max_side"),
        ({"min_side": 256, "max_side": 128}, "min_side and max_side"),
        ({"min_score": 0.0}, "min_score must be"),
        ({"max_share": 1.5}, "max_share must be"),
        ({"growth": 0.0}, "growth must be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextRemoval(**arguments)
