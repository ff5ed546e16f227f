"""The trainer's overhead: the time of its step compared with a bare torch loop that does the same step.

    python benchmarks/overhead.py --json overhead.json

Both train in one run on the same fixed attacks with precomputed reference embeddings, read by loaders of the same rows
in the same order, with the same loss, optimizer, clipping and schedule. The trainer logs its metrics every ten steps.
They take turns. The time of a step is measured from its batch to the next batch, and the median counts.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from inputs import letter_processor
from timing import parser, report
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PrinterCallback, TrainerCallback, get_scheduler
from transformers.utils import logging

from clip_po.config import ContrastivePOConfig
from clip_po.data.collator import DataCollatorForContrastivePreference
from clip_po.data.digits import DIGIT_NAMES, MODEL_PATH, PROMPT_TEMPLATE, digit_attack, load_digits_dataset
from clip_po.data.pairs import PreferencePairs
from clip_po.data.sampler import EpochSampler
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_texts
from clip_po.losses import LossSettings, preference_loss
from clip_po.policy import (
    CandidateLogps,
    candidate_logps,
    preference_logps,
    regularization_kl,
)
from clip_po.trainer import ContrastivePOTrainer

GOAL = 0.03
LOGGING_STEPS = 10
FEW = 160
"""Rows for the larger model. Its reference embeds all of them before the first step."""


@dataclass(frozen=True)
class Case:
    """A model, its preferences and the rows per batch."""

    name: str
    model: CLIPModel
    processor: CLIPProcessor
    rows: TypographicPreferences
    batch_size: int


def cases(quick: bool) -> Iterator[Case]:
    """Return the digits model, and a model with the width of a ViT-S/32."""
    digits: Dataset = load_digits_dataset("train")
    attack = replace(digit_attack("training"), redraw="never")
    rows = TypographicPreferences(digits, attack, DIGIT_NAMES, PROMPT_TEMPLATE)
    processor = CLIPProcessor.from_pretrained(MODEL_PATH)
    yield Case("digits model", CLIPModel.from_pretrained(MODEL_PATH), processor, rows, 8 if quick else 64)
    if quick:
        return
    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    config = CLIPConfig(text_config=tower, vision_config=tower)
    torch.manual_seed(0)
    few = TypographicPreferences(digits.select(range(FEW)), attack, DIGIT_NAMES, PROMPT_TEMPLATE)
    yield Case("width 384, 224 pixels", CLIPModel(config), letter_processor(config), few, 16)


class Begins(TrainerCallback):
    """Record when each step begins."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Record the time at which the batch is ready. Earlier time belongs to the previous step."""
        self.times.append(time.perf_counter())


def trainer_steps(case: Case, args: ContrastivePOConfig) -> list[float]:
    """Return the seconds of each step of the trainer after the first."""
    begins = Begins()
    trainer = ContrastivePOTrainer(
        case.model,
        args=args,
        train_dataset=case.rows,
        processing_class=case.processor,
        candidate_texts=case.rows.candidate_texts,
        callbacks=[begins],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seconds_between(begins.times)


def bare_steps(case: Case, args: ContrastivePOConfig) -> list[float]:
    """Return the seconds of each step of a loop that does only what the method requires."""
    model, texts = case.model, case.rows.candidate_texts
    pairs = PreferencePairs(case.rows, "clean_image")
    collator = DataCollatorForContrastivePreference(case.processor, texts)
    text_embeds = encode_texts(model, case.processor, texts)
    model.requires_grad_(False)
    trained = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    scale = model.logit_scale.detach().exp()
    model.train()
    embeds = {
        name: F.normalize(torch.randn(len(pairs), model.config.projection_dim), dim=-1) for name in pairs.fixed_images
    }
    pairs.attach_reference(embeds)  # the values of the reference do not change the cost of a step
    sampler = EpochSampler(len(pairs), case.batch_size, args.seed)
    loader = DataLoader(pairs, case.batch_size, sampler=sampler, collate_fn=collator)
    kind, settings = ContrastivePOTrainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(trained, **settings)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)
    loss_settings = LossSettings(args.beta)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from loader

    ends = []
    for _, batch in zip(range(args.max_steps), batches(), strict=False):
        ends.append(time.perf_counter())
        pixels = torch.cat([batch["pixel_values"], batch["reg_pixel_values"]])
        features = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        policy = CandidateLogps(*(candidate_logps(part, text_embeds, scale) for part in features.chunk(2)))
        known = (batch["ref_image_embeds"], batch["ref_reg_image_embeds"])
        reference = CandidateLogps(*(candidate_logps(part, text_embeds, scale) for part in known))
        losses = preference_loss(
            preference_logps(policy, reference, batch), args.loss_type, args.weights, loss_settings
        )
        loss = losses.mean() + args.reg_weight * regularization_kl(policy, reference).mean()
        loss.backward()
        clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return seconds_between(ends)


def seconds_between(ends: list[float]) -> list[float]:
    """Return the median, without the first step, which fills caches and creates the optimizer's state."""
    return [end - start for start, end in itertools.pairwise(ends[1:])]


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    table, found = [], {}
    for case in cases(args.quick):
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        steps = 8 if args.quick else 2 * LOGGING_STEPS
        for _ in range(1 if args.quick else args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                settings = ContrastivePOConfig(
                    folder,
                    max_steps=steps,
                    per_device_train_batch_size=case.batch_size,
                    precompute_ref_log_probs=True,
                    learning_rate=1e-6,
                    save_strategy="no",
                    logging_steps=LOGGING_STEPS,
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                )
                seconds["bare"] += bare_steps(case, settings)
                seconds["trainer"] += trainer_steps(case, settings)
        bare, trained = (statistics.median(seconds[name]) for name in ("bare", "trainer"))
        found[case.name] = {"bare": bare, "trainer": trained, "overhead": trained / bare - 1}
        table.append([case.name, str(case.batch_size), bare, trained, f"{100 * (trained / bare - 1):.1f}%"])
    columns = ["model", "batch", "bare loop, s", "trainer, s", f"overhead (goal {100 * GOAL:.0f}%)"]
    report(args, columns, table, found)


if __name__ == "__main__":
    main()
