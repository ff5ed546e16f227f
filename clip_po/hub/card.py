"""The model card: what was aligned, how, and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from clip_po.dual_encoder import as_dual_encoder
from clip_po.hub.markdown import code_span, escape_markdown
from clip_po.hub.redaction import publishable, without_folders
from clip_po.losses import WITHOUT_REJECTED

CheckpointKind = Literal["model", "adapter", "concept"]
"""What a checkpoint holds: a model, adapters of the base model, or a transformation of its embeddings."""

CARD_FILE = "README.md"
MEASURED = "## What was measured"
MOVED = "## How far training moved the model"
DRIFT_MEANS = (
    "The KL is KL(base || model) in nats, over prompts of everyday nouns and of the classes, with its 95% interval. "
    "Same answer is the share of images with the same most probable text."
)
PAPER = "2411.08923"

METHODS = {
    "sigmoid": "DPO",
    "sigmoid_norm": "DPO",
    "hinge": "hinge",
    "ipo": "IPO",
    "exo_pair": "EXO",
    "robust": "robust DPO",
    "discopop": "DiscoPOP",
    "nca_pair": "NCA",
    "bco_pair": "BCO",
    "sppo_hard": "SPPO",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "aot": "AOT",
    "aot_unpaired": "unpaired AOT",
    "kto_pair": "KTO",
    "kto": "KTO",
    "apo_zero_unpaired": "APO-zero",
    "simpo": "SimPO",
    "sft": "cross-entropy",
    "distillation": "distillation of clean answers",
    "embedding_distillation": "distillation of clean embeddings",
}
"""Name of the method in the card, by loss type."""

CARD_SETTINGS = (
    "policy",
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "reg_weight",
    "reg_type",
    "reg_share",
    "penalty_weight",
    "train_vision_model",
    "train_text_model",
    "trainable_layers",
    "learning_rate",
    "vision_learning_rate",
    "text_learning_rate",
    "layer_decay",
    "lr_scheduler_type",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
"""Arguments that the card repeats, where the configuration has them."""


def model_card(
    model_name: str,
    base_model: str,
    loss_types: list[str],
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    kind: CheckpointKind = "model",
    report: str | None = None,
    revision: str | None = None,
    drift: str | None = None,
    model_class: str = "CLIPModel",
) -> ModelCard:
    """Make the card of an aligned model.

    Args:
        model_name: Name of the model.
        base_model: Name of the model that was aligned.
        loss_types: Names in `clip_po.losses.LOSSES`.
        settings: Training settings, shown as a table without secrets and local folders. The text mentions the KL
            only if `reg_weight` is among them.
        metrics: Metrics of the last evaluation, by name. Only shown without a `report`.
        kind: What the checkpoint holds.
        report: A Markdown table of measurements before and after alignment.
        revision: Revision of the base model that adapters belong to; None for the newest.
        drift: A sentence that says how far training moved the model; None if that was not measured.
        model_class: Name of the class of the model in transformers.

    Returns:
        The card. Its `data` is the metadata that the Hub reads.
    """
    local = os.path.isabs(base_model) or os.path.exists(base_model)
    base = without_folders(base_model)
    data = ModelCardData(
        model_name=model_name,
        base_model=None if local else base_model,
        library_name={"model": "transformers", "adapter": "peft", "concept": "clip_po"}[kind],
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "clip_po", "preference-optimization", *sorted(set(loss_types))],
    )
    measured = report or _table({k: f"{v:.4f}" for k, v in sorted(metrics.items())}) or "Nothing was measured yet."
    moved = f"{MOVED}\n\n{drift} {DRIFT_MEANS}\n\n" if drift else ""
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {escape_markdown(model_name)}\n\n"
        f"{_what_was_done(base, loss_types, settings)}\n\n"
        f"```python\n{_loading_code(model_name, base, kind, revision, model_class)}\n"
        f"processor = {_processor_class(model_class)}.from_pretrained({json.dumps(model_name)})\n```\n\n"
        f"{MEASURED}\n\n{measured}\n\n"
        f"{moved}"
        f"## Settings\n\n{_table({k: json.dumps(v, default=str) for k, v in publishable(settings).items()})}\n"
    )


def _what_was_done(base: str, loss_types: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Say how the model was trained. What a loss prefers, or the KL keeps, is claimed only where it was trained."""
    method = escape_markdown(" + ".join(METHODS.get(name, name) for name in loss_types))
    prefers = "for an image, the preferred text rather than another" if set(loss_types) - WITHOUT_REJECTED else ""
    weight = settings.get("reg_weight")
    held = "the reference's image embeddings" if settings.get("reg_type") == "embedding" else "KL(reference || policy)"
    kept = {None: "", 0: "without regularization on ordinary images"}.get(
        weight, f"while {held} on ordinary images keeps the rest"
    )
    what = ", ".join(filter(None, (prefers, kept)))
    return (
        f"{code_span(base)}, aligned by preference optimization ({method}) with clip_po {version('clip_po')}"
        f"{f': {what}' if what else ''} (Afzali et al., ICLR 2025, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER}))."
    )


def _loading_code(
    model_name: str, base_model: str, kind: CheckpointKind, revision: str | None, model_class: str
) -> str:
    at = f", revision={json.dumps(revision)}" if revision else ""
    name, base = json.dumps(model_name), f"{model_class}.from_pretrained({json.dumps(base_model)}{at})"
    imports = f"from transformers import {', '.join(sorted([model_class, _processor_class(model_class)]))}"
    return {
        "model": f"{imports}\n\nmodel = {model_class}.from_pretrained({name})",
        "adapter": f"from peft import PeftModel\n{imports}\n\nmodel = PeftModel.from_pretrained({base}, {name})",
        "concept": f"from clip_po.concept import ConceptTransform\n{imports}\n\n"
        f"model = ConceptTransform.from_pretrained({name}).fold_into({base}, t=1.0)",
    }[kind]


def _processor_class(model_class: str) -> str:
    return "CLIPProcessor" if model_class == "CLIPModel" else "AutoProcessor"


def _table(rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| {escape_markdown(name)} | {escape_markdown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def card_of_run(
    trainer: Any, model_name: str, kind: CheckpointKind, report: str | None, drift: str | None = None
) -> ModelCard:
    """Make the card of the model that a `ContrastivePOTrainer` has trained.

    Args:
        trainer: The trainer, for its arguments, base model and last evaluation.
        model_name: Name of the model if the arguments name no repository.
        kind: What the checkpoint holds.
        report: A Markdown table of measurements before and after alignment; None to show the last evaluation instead.
        drift: As for `model_card`.

    Returns:
        The card, not yet saved.
    """
    args, settings = trainer.args, trainer.args.to_dict()
    return model_card(
        args.hub_model_id or model_name,
        args.base_model_id or trainer.encoder.config.name_or_path or "CLIPModel",
        args.loss_type,
        {name: settings[name] for name in CARD_SETTINGS if name in settings},
        _last_evaluation(trainer.state.log_history),
        kind,
        report,
        trainer.model.peft_config[trainer.model.active_adapter].revision if kind == "adapter" else None,
        drift,
        as_dual_encoder(trainer.encoder).class_name,
    )


def _last_evaluation(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of the last evaluated step in a trainer's log, without timings."""
    evaluations = [log for log in log_history if any(key.startswith("eval_") for key in log)]
    last = [log for log in evaluations if log["step"] == evaluations[-1]["step"]]
    metrics = {name: float(value) for log in last for name, value in log.items() if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))}


def update_card(folder: Path, table: str) -> None:
    """Replace the measurements in the model card of a folder. Do nothing if there is no card.

    Args:
        folder: Folder of the model.
        table: Markdown.
    """
    file = folder / CARD_FILE
    if not file.is_file() or MEASURED not in (text := file.read_text(encoding="utf-8")):
        return
    before, _, rest = text.partition(MEASURED)
    _, heading, after = rest.partition("\n## ")
    file.write_text(f"{before}{MEASURED}\n\n{table}\n{heading}{after}", encoding="utf-8")
