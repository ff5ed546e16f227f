"""Trains the tiny CLIP on a stream and on rows with broken images, alone or as one of several processes."""

import json
import os
import sys
from pathlib import Path

import datasets
from accelerate import PartialState
from samples import CLASSES, make_labelled, make_preferences, make_trainer

from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicStream

GLOBAL_BATCH = 4
BROKEN = {"bytes": b"no image", "path": None}


def with_broken(dataset, rows, column="image"):
    """A data set in which the images of some rows can't be read."""
    raw = {name: datasets.Image(decode=False) for name, f in dataset.features.items() if isinstance(f, datasets.Image)}
    stored = dataset.cast(datasets.Features({**dataset.features, **raw}))
    columns = {name: list(stored[name]) for name in stored.column_names}
    columns[column] = [BROKEN if row in rows else image for row, image in enumerate(columns[column])]
    return datasets.Dataset.from_dict(columns, features=dataset.features)


def data_sets():
    """By name, what is trained on; the broken rows make the last, ragged batch of a pass one of nothing else."""
    stream = with_broken(make_labelled(10), {3, 8, 9}).to_iterable_dataset(num_shards=2)
    attack = TypographicAttack(CLASSES, min_side=32)
    preferences = with_broken(with_broken(make_preferences(10), {1, 7}), {7, 4}, "clean_image")
    return {
        "stream": {"train_dataset": TypographicStream(stream.shuffle(seed=0, buffer_size=4), attack)},
        "rows": {"train_dataset": preferences, "eval_dataset": with_broken(make_preferences(7), {6})},
        "apart": {"train_dataset": preferences, "reg_dataset": with_broken(make_labelled(3), {0})},
    }


def run(model, folder):
    """Train on each; returns the logs by name, in the process that writes them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for name, data in data_sets().items():
        trainer = make_trainer(
            model,
            folder / f"{name}-{processes}",
            per_device_train_batch_size=GLOBAL_BATCH // processes,
            per_device_eval_batch_size=4 // processes,
            max_steps=6,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            on_bad_image="skip",
            **data,
        )
        trainer.train()
        if "eval_dataset" in data:
            trainer.evaluate()
        found[name] = trainer.state.log_history
    return found


if __name__ == "__main__":
    logs = run(sys.argv[1], Path(sys.argv[2]))
    if PartialState().is_main_process:
        Path(sys.argv[2], "two.json").write_text(json.dumps(logs))
