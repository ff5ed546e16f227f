"""Trains the tiny CLIP, from the last whole checkpoint if any: started, and killed, by test_checkpoints.py."""

import sys

import torch
from samples import CLASSES, PROMPTS, make_labelled

from clip_po.averaging import BetaMovingAverageCallback
from clip_po.checkpoints import last_whole_checkpoint
from clip_po.config import ContrastivePOConfig
from clip_po.data.pairs import TypographicPreferences
from clip_po.data.typographic import TypographicAttack
from clip_po.trainer import ContrastivePOTrainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder = sys.argv[1:]
    args = ContrastivePOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=30,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1000,
    )
    trainer = ContrastivePOTrainer(
        model,
        args=args,
        train_dataset=TypographicPreferences(make_labelled(16), TypographicAttack(CLASSES, min_side=32)),
        candidate_texts=PROMPTS,
        callbacks=[BetaMovingAverageCallback()],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    trainer.save_model()
