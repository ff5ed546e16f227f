"""Trains the tiny CLIP and pushes it to the Hub that HF_ENDPOINT names: started by test_hub.py."""

import sys

import torch
from samples import PROMPTS, make_preferences

from clip_po.config import ContrastivePOConfig
from clip_po.trainer import ContrastivePOTrainer

torch.set_num_threads(1)
model, folder, token, strategy = sys.argv[1:]
args = ContrastivePOConfig(
    output_dir=folder,
    max_steps=4,
    save_steps=2,
    per_device_train_batch_size=4,
    push_to_hub=True,
    hub_model_id="me/aligned",
    hub_token=token,
    hub_strategy=strategy,
    base_model_id="openai/clip-vit-base-patch32",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = ContrastivePOTrainer(
    model, args=args, train_dataset=make_preferences(8), eval_dataset=make_preferences(5), candidate_texts=PROMPTS
)
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
