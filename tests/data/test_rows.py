"""The row protocol: both adapters implement it, and the trainer accepts any other implementation."""

import pytest
import torch
from samples import CLASSES, PROMPTS, make_labelled, make_preferences, picture, run_config

from clip_po.candidates import CandidateTexts
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.pairs import PreferencePairs
from clip_po.data.rows import DatasetRows, PreferenceRows, as_rows
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.trainer import ContrastivePOTrainer

ATTACK = TypographicAttack(CLASSES, min_side=32)
ADAPTERS = {
    "dataset": lambda: DatasetRows(make_preferences(5), CandidateTexts(), "rows"),
    "attack": lambda: TypographicPreferences(make_labelled(5), ATTACK),
}


class Pictures:
    """The smallest implementation: pictures that prefer a cat to a dog."""

    column_names = ("image", "clean_image", "chosen", "rejected")
    redrawn = transformed = False

    def __len__(self):
        return 6

    def row(self, index, epoch):
        return {**{name: self.image(name, index) for name in self.column_names[:2]}, **self.texts(index, epoch)}

    def texts(self, index, epoch):
        return {"chosen": PROMPTS[0], "rejected": [PROMPTS[1]]}

    def image(self, name, index):
        return picture(index + (100 if name == "clean_image" else 0))

    def digest(self, name):
        return None

    def check(self, candidate_texts, loss_types, name):
        """Every loss accepts these texts."""


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_rows_texts_and_images_are_parts_of_it(kind):
    rows = ADAPTERS[kind]()
    assert isinstance(rows, PreferenceRows)
    for index in range(len(rows)):
        whole = rows.row(index, 0)
        texts = {name: value for name, value in whole.items() if name not in ("image", "clean_image")}
        assert rows.texts(index, 0) == texts
        for name in ("image", "clean_image"):
            assert rows.image(name, index).tobytes() == whole[name].tobytes()
    assert rows.digest("image") != rows.digest("clean_image")


def test_the_word_of_a_row_is_drawn_once(monkeypatch):
    drawn = []
    written = TypographicAttack.written

    def counted(attack, index, epoch, exclude):
        drawn.append((index, epoch))
        return written(attack, index, epoch, exclude)

    monkeypatch.setattr(TypographicAttack, "written", counted)
    rows = ADAPTERS["attack"]()
    rows.row(3, 2)
    assert drawn == [(3, 2)]
    rows.texts(3, 2)
    assert drawn == [(3, 2)] * 2


def test_the_trainer_accepts_any_implementation(clip_folder, tmp_path):
    rows = Pictures()
    assert as_rows(rows, CandidateTexts(), "rows") is rows
    assert PreferencePairs(rows, "clean_image")[2]["reg_image"].tobytes() == picture(102).tobytes()
    args = run_config(tmp_path, max_steps=2, embeddings_cache=str(tmp_path / "cache"))
    trainer = ContrastivePOTrainer(str(clip_folder), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_what_is_neither_is_refused():
    with pytest.raises(TypeError, match=r"rows must be a datasets\.Dataset or TypographicPreferences, got list"):
        as_rows([{"image": picture(0)}], CandidateTexts(), "rows")
