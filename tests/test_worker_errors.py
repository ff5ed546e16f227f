"""An error in a worker of a data loader is said in the words it was raised with."""

import pytest
from torch.utils.data import DataLoader

from clip_po.cli import demo, main
from clip_po.validation import UnreadableImage
from clip_po.worker_errors import raised_message

SENTENCE = "Row 3: ValueError: this can't be used. Fix it."


class Failing:
    """Items that can't be loaded."""

    def __init__(self, error_type):
        self.error_type = error_type

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error_type(SENTENCE)


def load(error_type, workers):
    return list(DataLoader(Failing(error_type), num_workers=workers))


@pytest.mark.parametrize("error_type", [ValueError, OSError, TypeError, FloatingPointError, UnreadableImage])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_message_of_a_worker_is_left_without_its_traceback(error_type, workers, monkeypatch, capsys):
    with pytest.raises(error_type) as raised:
        load(error_type, workers)
    assert raised_message(error_type, str(raised.value)) == SENTENCE
    monkeypatch.setattr(demo, "main", lambda argv: load(error_type, workers))
    assert main.run("demo", []) == main.USAGE_ERROR
    assert capsys.readouterr().err == f"clip-po demo: {SENTENCE}\n"


def test_other_messages_stay():
    assert raised_message(ValueError, SENTENCE) == SENTENCE
    assert raised_message(ValueError, "Caught nothing. ValueError: x") == "Caught nothing. ValueError: x"
