"""Trains the tiny CLIP in one of several processes and writes down what it saw: started by test_processes.py."""

import json
import os
import sys
from pathlib import Path

import datasets
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from safetensors.torch import save_file
from samples import (
    PROMPTS,
    make_captioned,
    make_image_pairs,
    make_labelled,
    make_preferences,
    make_trainer,
    make_unpaired,
    run_config,
)
from transformers import TrainerCallback

from clip_po.concept import ConceptConfig, ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.training.sharding import SHARDING_IS_EXACT

GLOBAL_BATCH = 8
TEXT_ALONE = {"train_vision_model": False, "train_text_model": True}
EVERY_KIND = {
    "rows": "every_kind",
    "loss_type": ["sigmoid", "kto"],
    "in_batch_candidates": True,
    "learning_rate": 1e-3,
}
IN_BATCH = {"own_texts": True, "in_batch_candidates": True, "learning_rate": 1e-3}
# By name: arguments of the configuration; `lora`, `concept`, `own_texts`, `weighted` and `rows` say what else differs.
RUNS = {
    "sigmoid": {"loss_type": "sigmoid"},
    "kto": {"loss_type": "kto_pair", "beta": 1.0, "gradient_accumulation_steps": 2},
    "sorted": {"loss_type": ["aot", "aot_unpaired"], "beta": 1.0, "gradient_accumulation_steps": 2, "max_steps": 10},
    "followed": {"sync_ref_model": True, "ref_model_sync_steps": 3, "train_text_model": True, "max_steps": 10},
    "accumulated": {"loss_type": ["ipo", "sft"], "gradient_accumulation_steps": 2, "train_text_model": True},
    "in_batch": {**IN_BATCH, "gradient_accumulation_steps": 2, "train_text_model": True},
    "in_chunks": {**IN_BATCH, "train_text_model": True, "tower_chunk_size": 2, "max_steps": 10},
    "in_batch_frozen": {**IN_BATCH, "loss_type": ["sigmoid", "distillation"], "max_steps": 10},
    "text_alone": {**TEXT_ALONE, "trainable_layers": 1, "learning_rate": 1e-3, "max_steps": 10},
    "scale": {"train_logit_scale": True, "precompute_ref_log_probs": False, "max_steps": 10},
    "lora": {"lora": True, "max_steps": 10},
    "weighted": {"weighted": True, "gradient_accumulation_steps": 2, "max_steps": 10},
    "concept": {"concept": True, "max_steps": 10},
    "images": {"rows": "images", "gradient_accumulation_steps": 2, "max_steps": 10},
    "images_in_batch": {"rows": "images", "in_batch_candidates": True, "loss_type": "sft", "max_steps": 10},
    "images_frozen": {
        **TEXT_ALONE,
        "rows": "images",
        "in_batch_candidates": True,
        "loss_type": "sft",
        "max_steps": 10,
    },
    "unpaired": {"rows": "unpaired", "loss_type": "kto", "beta": 1.0, "max_steps": 10},
    "every_kind": {**EVERY_KIND, "train_text_model": True, "max_steps": 10},
    "distillation": {"loss_type": ["distillation", "sft"], "loss_weights": [1.0, 0.5], "max_steps": 10},
}
SHARDED_RUNS = {
    "sharded": {"loss_type": "kto_pair", "beta": 1.0, "max_steps": 4},
    "sharded_in_batch": {**IN_BATCH, "train_text_model": True, "max_steps": 4},
    "sharded_text_alone": {**TEXT_ALONE, "learning_rate": 1e-3, "max_steps": 4},
    "sharded_lora": {"lora": True, "max_steps": 4},
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def preferences_with_own_texts(rows):
    """Rows with one to three rejected texts, most of which other rows have too."""
    preferences = make_preferences(rows)
    rejected = [
        [text for text in (*PROMPTS[row % 3 :], f"a {'xyz'[row % 3]}") if text != preferences[row]["chosen"]][:3]
        for row in range(rows)
    ]
    rejected = [texts[: 1 + row % 3] for row, texts in enumerate(rejected)]
    column = datasets.List(datasets.Value("string"))
    return preferences.remove_columns("rejected").add_column("rejected", rejected, feature=column)


def weighted_preferences(rows):
    """Rows of different weights; a process may get a batch of nothing but rows of weight 0."""
    return make_preferences(rows).add_column("weight", [[2.0, 0.0, 0.0, 0.5, 1.0][row % 5] for row in range(rows)])


def every_kind(rows):
    """Preferences between texts and between images, some of them of one image, and unpaired feedback."""
    texts = preferences_with_own_texts(rows // 3).remove_columns("clean_image")
    images = make_image_pairs(rows // 3)
    again = images.select(range(2))
    return datasets.concatenate_datasets([texts, images, again, make_unpaired(rows - 2 * (rows // 3) - 2)])


MAKERS = {
    "images": lambda rows: make_image_pairs(rows, rejected=2),
    "unpaired": make_unpaired,
    "every_kind": every_kind,
}


def run(name, settings, model, folder):
    """Train and evaluate; the logs, the first gradients and the final model go to `folder`/`name`-`processes`."""
    settings = dict(settings)
    lora, concept, own, weighted = (settings.pop(key, False) for key in ("lora", "concept", "own_texts", "weighted"))
    make = preferences_with_own_texts if own else weighted_preferences if weighted else make_preferences
    kind = settings.pop("rows", None)
    make = MAKERS.get(kind, make)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    place = folder / f"{name}-{processes}"
    args = run_config(
        place,
        ConceptConfig if concept else ContrastivePOConfig,
        per_device_train_batch_size=GLOBAL_BATCH // processes // accumulation,
        per_device_eval_batch_size=4 // processes,
        optim="sgd",
        logging_steps=1,
        **{"max_steps": 50, "learning_rate": 1e-2, **settings},
    )
    adapters = LoraConfig(r=4, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
    what = {"concept": ConceptTransform(16)} if concept else {"peft_config": adapters} if lora else {}
    if name in SHARDED_RUNS and processes > 1:
        shard_from_here_on()
    gradients = Gradients()
    trainer = make_trainer(
        model,
        place,
        args,
        train_dataset=make(13),
        eval_dataset=make(11),
        reg_dataset=make_labelled(7) if kind is None else make_captioned(7),
        candidate_texts=None if own or kind is not None else PROMPTS,
        callbacks=[gradients],
        **what,
    )
    trainer.train()
    result = trainer.evaluate()
    if name in SHARDED_RUNS:
        trainer.save_model()
    if trainer.is_world_process_zero():
        place.mkdir(exist_ok=True)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        kinds = sorted({type(parameter).__name__ for parameter in trainer.model.parameters()})
        found = {"train": logs, "eval": {k: v for k, v in result.items() if "per_second" not in k}}
        found |= {"processes": trainer.accelerator.num_processes, "kinds": kinds}
        (place / "found.json").write_text(json.dumps(found))
        if name not in SHARDED_RUNS:
            save_file(gradients.first, place / "gradients.safetensors")


def shard_from_here_on():
    """Have accelerate prepare models for FSDP2 on a CPU too, where it would leave the plugin aside and use DDP."""
    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def main(model, folder):
    sharded = SHARDED_RUNS if SHARDING_IS_EXACT else {}
    for name, settings in {**RUNS, **sharded}.items():  # nothing goes back to DDP
        run(name, settings, model, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
