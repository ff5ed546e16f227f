"""Forward and backward of a step, compared with the straight step (baseline.py) and with the bare vision tower.

    python benchmarks/step.py --json step.json

ViT-B/32 with random weights, 16 preferences with their 16 ordinary images, 100 candidate texts, float32. Each way of
training takes turns with the two others, each in its own process with its own peak memory. The timed code is the
trainer's own `training_step` on a batch from its loader, without the optimizer and without reading images. The
straight step is timed without its average of the weights. The average is updated after the optimizer's step and timed
separately.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from baseline import StraightStep
from inputs import clip_config, preferences, read_model, write_inputs
from peft import LoraConfig
from timing import Contestant, Step, parser, ratio, report, take_turns
from transformers import PrinterCallback

from clip_po.concept.trainer import ConceptConfig, ConceptTrainer
from clip_po.concept.transform import ConceptTransform
from clip_po.config import ContrastivePOConfig
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.encoding import encode_images
from clip_po.trainer import ContrastivePOTrainer

PAIRS, CANDIDATES = 16, 100
BETA = 0.1
BARE_GOAL = 1.05


@dataclass(frozen=True)
class Way:
    """One way of training, and its maximum share of the straight step.

    Attributes:
        goal: Maximum ratio to the time of the straight step.
        redraw: `redraw` of the attack. "never" fixes the images.
        lora: Number of blocks with adapters on q and v, from the last. None trains the whole vision tower.
        concept: Whether to train a transformation of the embeddings instead.
        loss_type: As for the trainer.
    """

    goal: float
    redraw: Literal["never", "every_epoch"] = "never"
    lora: int | None = None
    concept: bool = False
    loss_type: tuple[str, ...] = ("sigmoid",)


SOFT = ("sft", "distillation")
ALL_BLOCKS = 12
WAYS = {
    "full": Way(0.62),
    "LoRA on q, v": Way(0.48, lora=ALL_BLOCKS),
    "LoRA, last four blocks": Way(0.30, lora=4),
    "transformation": Way(0.01, concept=True),
    "full, fresh attack": Way(0.74, "every_epoch"),
    "LoRA, fresh attack": Way(0.61, "every_epoch", lora=ALL_BLOCKS),
    "full, fresh attack, label-free": Way(0.62, "every_epoch", loss_type=SOFT),
    "LoRA, fresh attack, label-free": Way(0.48, "every_epoch", lora=ALL_BLOCKS, loss_type=SOFT),
}


def make_trainer(
    folder: Path, way: Way, rows: TypographicPreferences, quick: bool, output: str, **options: Any
) -> ContrastivePOTrainer:
    """Return the trainer of a way, for the model in a folder."""
    depth = clip_config(quick).vision_config.num_hidden_layers
    blocks = "|".join(str(block) for block in range(max(0, depth - (way.lora or 0)), depth))
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules=rf".*vision_model.*\.({blocks})\..*\.(q_proj|v_proj)")
    config = {name: options.pop(name) for name in tuple(options) if name in ContrastivePOConfig.__dataclass_fields__}
    model, processor = read_model(folder)
    trainer_class, config_class, models = ContrastivePOTrainer, ContrastivePOConfig, [model]
    if way.concept:
        trainer_class, config_class = ConceptTrainer, ConceptConfig
        models.append(ConceptTransform(model.config.projection_dim))
    else:
        options["peft_config"] = adapters if way.lora is not None else None
    trainer = trainer_class(
        *models,
        args=config_class(
            output,
            **{
                "per_device_train_batch_size": PAIRS,
                "per_device_eval_batch_size": PAIRS,
                "loss_type": list(way.loss_type),
                "beta": BETA,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_strategy": "no",
                "report_to": "none",
                "base_model_id": "ViT-B-32",
                "disable_tqdm": True,
                **config,
            },
        ),
        train_dataset=rows,
        processing_class=processor,
        candidate_texts=rows.candidate_texts,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(folder: Path, way: Way, quick: bool, pairs: int = PAIRS, candidates: int = CANDIDATES) -> Step:
    """Return the trainer's step. It returns the loss and whether the text embeddings have a gradient."""
    rows = preferences(folder, pairs, candidates, way.redraw)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(folder, way, rows, quick, output, per_device_train_batch_size=pairs)
    trainer.state.max_steps = 1  # Trainer.train sets it the same way
    batches, total = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.accelerator.device)

    def step() -> tuple[float, bool]:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, dict(batches[0]), total)
        return loss.item(), trainer.encoder.text_model.embeddings.token_embedding.weight.grad is not None

    return step


def straight(folder: Path, quick: bool, part: str = "step") -> Step:
    """Return the straight step, or only the update of its average."""
    rows = preferences(folder, PAIRS, CANDIDATES, "never")
    baseline = StraightStep(*read_model(folder), rows.candidate_texts, BETA)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(folder, Way(1.0), rows, quick, output, precompute_ref_log_probs=False)
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> tuple[float, bool]:
        baseline.model.zero_grad()
        loss = baseline.loss(batch)
        loss.backward()
        return loss.item(), baseline.model.text_model.embeddings.token_embedding.weight.grad is not None

    return step if part == "step" else baseline.update_average


def bare(folder: Path) -> Step:
    """Return forward and backward of the vision tower with its projection, on the images of a step."""
    model, _ = read_model(folder)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    model.visual_projection.requires_grad_(True)
    side = model.config.vision_config.image_size
    pixels = torch.randn(2 * PAIRS, 3, side, side)
    model.train()

    def step() -> None:
        model.zero_grad()
        encode_images(model, pixels).sum().backward()

    return step


def measure(folder: Path, way: Way, args: argparse.Namespace, others: dict[str, Contestant]) -> dict[str, Any]:
    """Return the seconds of a way, of the straight step and of the bare tower, in turns."""
    with Contestant(trained, folder, way, args.quick, threads=args.threads) as ours:
        seconds = take_turns({**others, "ours": ours}, args.rounds)
        found = {
            "seconds": seconds,
            "of_straight": ratio(seconds["ours"], seconds["straight"]),
            "of_bare": ratio(seconds["ours"], seconds["bare"]),
            "goal": way.goal,
            "peak_bytes": ours.peak(),
            "loss": ours.take()[1][0],
            "text_gradient": ours.take()[1][1],
        }
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = arguments.parse_args()
    contestant = functools.partial(Contestant, threads=args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, PAIRS, args.quick)
        with contestant(straight, folder, args.quick) as other, contestant(bare, folder) as tower:
            found = {way: measure(folder, WAYS[way], args, {"straight": other, "bare": tower}) for way in args.ways}
            peak, loss = other.peak(), other.take()[1][0]
        with contestant(straight, folder, args.quick, "average") as average:
            update = min(take_turns({"average": average}, args.rounds)["average"])
    table = [
        [way, f["of_straight"], f["goal"], f["of_bare"], f["peak_bytes"] / peak, f["peak_bytes"] / 2**20]
        for way, f in found.items()
    ]
    base = {"peak_bytes": peak, "loss": loss, "average_seconds": update}
    report(
        args,
        ["way", "of the straight step", "goal", "of the bare tower", "of its peak memory", "peak, MiB"],
        table,
        {"straight": base, "bare_goal": BARE_GOAL, "ways": found},
    )
    print(f"straight: loss {loss:.5f}, peak {peak / 2**20:.0f} MiB; its average takes {update:.3f} s more")
    print("losses: " + ", ".join(f"{way} {f['loss']:.5f}" for way, f in found.items()))


if __name__ == "__main__":
    main()
