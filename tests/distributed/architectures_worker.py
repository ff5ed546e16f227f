"""Trains both towers of a tiny model of any architecture in one or two processes: started by test_architectures.py."""

import json
import os
import sys
from pathlib import Path

from distributed.worker import shard_from_here_on
from samples import make_preferences, make_trainer, run_config

GLOBAL_BATCH = 4


def main(model, folder, layout):
    """Train three steps; logs and model go to `folder`/`layout`-`processes`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    place = Path(folder) / f"{layout}-{processes}"
    args = run_config(
        place,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        per_device_eval_batch_size=GLOBAL_BATCH // processes,
        optim="sgd",
        learning_rate=1e-2,
        max_steps=3,
        logging_steps=1,
        train_text_model=True,
    )
    if layout == "sharded" and processes > 1:
        shard_from_here_on()
    trainer = make_trainer(model, place, args, train_dataset=make_preferences(9), eval_dataset=make_preferences(7))
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        kinds = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
        found = {"losses": losses, "eval": [result["eval_loss"], result["eval_kl"]], "kinds": kinds}
        (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
