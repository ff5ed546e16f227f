"""One shape for every case of bad input: what is done, what is raised, and what the message must say."""

import traceback
from dataclasses import dataclass

import pytest
from samples import make_labelled, make_preferences, make_trainer, run_config

NAN = float("nan")
INF = float("inf")
RUN = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1}


@dataclass(frozen=True)
class Case:
    """A call that must be refused.

    Attributes:
        call: Takes the `Bench`.
        kind: The exception, exactly.
        says: Pieces of text of the message: where it is wrong, what was found, what to do.
    """

    call: object
    kind: type
    says: tuple


def case(call, kind, *says):
    return Case(call, kind, says)


def check(wanted, bench):
    """Run a case: the exception comes from this package, and says everything that it must."""
    with pytest.raises(wanted.kind) as error:
        wanted.call(bench)
    assert type(error.value) is wanted.kind
    raised_in = traceback.extract_tb(error.value.__traceback__)[-1].filename
    assert "/clip_po/" in raised_in, f"raised by {raised_in}"
    message = str(error.value)
    assert [piece for piece in wanted.says if piece not in message] == [], message


@dataclass(frozen=True)
class Bench:
    """What the calls of a table work with.

    Attributes:
        folder: Of the case alone.
        clip: Folder of the tiny CLIP, which no case changes.
        model: A tiny CLIP that no case changes.
        processor: Its processor.
    """

    folder: object
    clip: object
    model: object
    processor: object

    def config(self, **arguments):
        return run_config(self.folder / "run", **{**RUN, **arguments})

    def trainer(self, train_dataset=None, model=None, **arguments):
        """A trainer; what it takes itself by its names, the rest goes to the configuration."""
        rows = make_preferences(4) if train_dataset is None else train_dataset
        model = model if model is not None else self.clip
        return make_trainer(model, self.folder / "run", train_dataset=rows, **{**RUN, **arguments})


def preferences(**columns):
    """Four preferences with other columns, or without those that are None."""
    rows = make_preferences(4)
    for name, values in columns.items():
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        if values is not None:
            rows = rows.add_column(name, values)
    return rows


def labelled(**columns):
    """Four labelled images with other columns, or without those that are None."""
    rows = make_labelled(4)
    for name, values in columns.items():
        rows = rows.remove_columns(name) if name in rows.column_names else rows
        rows = rows if values is None else rows.add_column(name, values)
    return rows
