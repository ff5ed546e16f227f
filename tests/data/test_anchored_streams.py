"""Streams of rows of two images, of unpaired feedback and of several kinds train as the same rows in a dataset."""

import datasets
import pytest
import torch
from samples import (
    StopAt,
    make_captioned,
    make_image_pairs,
    make_preferences,
    make_unpaired,
    weights,
)
from tolerances import LOGPS, RUNS

RUN = {
    "candidate_texts": None,
    "reg_weight": 0.0,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "max_steps": 4,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}


def mixed():
    return datasets.concatenate_datasets(
        [make_unpaired(5), make_image_pairs(4), make_preferences(4).remove_columns("clean_image")]
    )


ROWS = {
    "images": (lambda: make_image_pairs(13), {}),
    "several images": (
        lambda: make_image_pairs(13, rejected=3),
        {"reg_dataset": make_captioned(5), "reg_weight": 1.0},
    ),
    # Rows that fill up the last batch are others in a stream, and count as little.
    "unpaired": (lambda: make_unpaired(13), {"loss_type": "kto"}),
    "mixed": (mixed, {"loss_type": ["sigmoid", "kto"], "in_batch_candidates": True}),
}


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ROWS)
def test_a_stream_trains_as_the_dataset(make_trainer, kind):
    make, settings = ROWS[kind]
    runs = [make_trainer(rows, **settings) for rows in (make(), make().to_iterable_dataset())]
    for trainer in runs:
        trainer.train()
    for name, value in weights(runs[0].model).items():
        torch.testing.assert_close(weights(runs[1].model)[name], value, rtol=RUNS, atol=LOGPS)


def test_a_stream_resumes(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2}
    stream = mixed().to_iterable_dataset()
    kinds = ROWS["mixed"][1]
    whole = make_trainer(stream, folder="whole", **settings, **kinds)
    whole.train()
    make_trainer(stream, folder="parts", callbacks=[StopAt(2)], **settings, **kinds).train()
    resumed = make_trainer(stream, folder="parts", **settings, **kinds)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=1e-7)


def test_a_row_of_a_stream_is_checked_as_it_arrives(make_trainer):
    rows = make_image_pairs(6, texts=["a cat", "a dog", " "]).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 2 of the stream: column 'text'"):
        make_trainer(rows).train()


def test_losses_are_checked_by_the_columns(make_trainer):
    with pytest.raises(ValueError, match="Use loss_type='kto'"):
        make_trainer(make_unpaired(4).to_iterable_dataset(), loss_type="sigmoid")
