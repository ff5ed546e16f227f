"""Trains the tiny CLIP in one of several processes and writes down what it saw: started by test_processes.py."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file
from samples import PROMPTS, make_labelled, make_preferences
from transformers import TrainerCallback

from clip_po.config import ContrastivePOConfig
from clip_po.trainer import ContrastivePOTrainer

GLOBAL_BATCH = 8
RUNS = {
    "sigmoid": {"loss_type": "sigmoid"},
    "kto": {"loss_type": "kto_pair", "beta": 1.0},
    "accumulated": {"loss_type": ["ipo", "sft"], "gradient_accumulation_steps": 2, "train_text_model": True},
    "scale": {"loss_type": "sigmoid", "train_logit_scale": True, "precompute_ref_log_probs": False},
    "lora": {"loss_type": "sigmoid", "lora": True},
    "distillation": {"loss_type": ["distillation", "sft"], "loss_weights": [1.0, 0.5]},
}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run(name, model, folder):
    settings = dict(RUNS[name])
    lora = settings.pop("lora", False)
    steps = settings.get("gradient_accumulation_steps", 1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = ContrastivePOConfig(
        output_dir=str(folder / f"run-{name}-{processes}"),
        per_device_train_batch_size=GLOBAL_BATCH // processes // steps,
        per_device_eval_batch_size=4 // processes,
        max_steps=50,
        learning_rate=1e-2,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    gradients = Gradients()
    trainer = ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=make_preferences(13),
        eval_dataset=make_preferences(11),
        reg_dataset=make_labelled(7),
        candidate_texts=PROMPTS,
        callbacks=[gradients],
        peft_config=LoraConfig(r=4, target_modules=r".*vision_model.*\.(q_proj|v_proj)", init_lora_weights=False)
        if lora
        else None,
    )
    trainer.train()
    result = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        text = json.dumps({"train": logs, "eval": {k: v for k, v in result.items() if "per_second" not in k}})
        (folder / f"{name}-{processes}.json").write_text(text)
        save_file(gradients.first, folder / f"{name}-{processes}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run_name in RUNS:
        run(run_name, sys.argv[1], Path(sys.argv[2]))
    PartialState().destroy_process_group()  # else gloo may abort a process that ends before the others
