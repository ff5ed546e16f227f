"""Trains the tiny CLIP and pushes it to the Hub of HF_ENDPOINT, by each strategy: started by test_publishing.py."""

import sys

import torch
from samples import make_preferences, make_trainer

torch.set_num_threads(1)
model, folder, token, *strategies = sys.argv[1:]
for strategy in strategies:
    trainer = make_trainer(
        model,
        f"{folder}/{strategy}",
        train_dataset=make_preferences(8),
        eval_dataset=make_preferences(5),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id=f"me/{strategy}",
        hub_token=token,
        hub_strategy=strategy,
        base_model_id="openai/clip-vit-base-patch32",
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
