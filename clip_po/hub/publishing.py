"""Saving and publishing: safetensors, a model card, and no pickle that could carry a token away."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from clip_po.evaluation.report.report_file import read_report
from clip_po.evaluation.report.summary import markdown_summary
from clip_po.hub.redaction import redacted

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)

TRAINING_ARGS_FILE = "training_args.json"
CARD_FILE = "README.md"
MEASURED = "## What was measured"
PAPER = "2411.08923"

METHODS = {
    "sigmoid": "DPO",
    "ipo": "IPO",
    "kto_pair": "KTO",
    "sft": "cross-entropy",
    "distillation": "distillation of clean answers",
}


def model_card(
    model_name: str,
    base_model: str,
    loss_types: list[str],
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    kind: Literal["model", "adapter", "concept"] = "model",
    report: str | None = None,
) -> ModelCard:
    """The card of an aligned model: what was aligned, how, and what was measured.

    Args:
        model_name: Name of the model.
        base_model: Name of the model that was aligned.
        loss_types: Names of `clip_po.losses.LOSSES`.
        settings: What the training was set to, shown as a table.
        metrics: The last evaluation, by name.
        kind: What the checkpoint holds: a model, adapters of the base model, or a transformation of its embeddings.
        report: A Markdown table of what was measured before and after.

    Returns:
        The card; its `data` is the metadata that the Hub reads.
    """
    method = " + ".join(METHODS.get(name, name) for name in loss_types)
    local = os.path.isabs(base_model) or os.path.exists(base_model)
    data = ModelCardData(
        model_name=model_name,
        base_model=None if local else base_model,
        library_name={"model": "transformers", "adapter": "peft", "concept": "clip_po"}[kind],
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "clip_po", "preference-optimization", *sorted(set(loss_types))],
    )
    base = f'CLIPModel.from_pretrained("{base_model}")'
    load = {
        "model": "from transformers import CLIPModel, CLIPProcessor\n\n"
        f'model = CLIPModel.from_pretrained("{model_name}")',
        "adapter": "from peft import PeftModel\nfrom transformers import CLIPModel, CLIPProcessor\n\n"
        f'model = PeftModel.from_pretrained({base}, "{model_name}")',
        "concept": "from clip_po import ConceptTransform\nfrom transformers import CLIPModel, CLIPProcessor\n\n"
        f'model = ConceptTransform.load("{model_name}").fold_into({base}, t=1.0)',
    }[kind]
    measured = report or _table({k: f"{v:.4f}" for k, v in sorted(metrics.items())}) or "Nothing was measured yet."
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {model_name}\n\n"
        f"`{base_model}`, aligned by preference optimization ({method}) with clip_po {version('clip_po')}: for an "
        "image, the preferred text rather than another, while KL(reference || policy) on ordinary images keeps the "
        f"rest (Afzali et al., ICLR 2025, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})).\n\n"
        f'```python\n{load}\nprocessor = CLIPProcessor.from_pretrained("{model_name}")\n```\n\n'
        f"{MEASURED}\n\n{measured}\n\n"
        f"## Settings\n\n{_table({k: json.dumps(v, default=str) for k, v in redacted(settings).items()})}\n"
    )


def _table(rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _report_table(folder: Path) -> str | None:
    """What `clip-po evaluate` wrote beside the model, as Markdown."""
    report = folder / "report.json"
    return markdown_summary(read_report(report)) if report.is_file() else None


def put_into_card(folder: Path, table: str) -> None:
    """Replace what a model card in the folder says was measured; without a card nothing happens.

    Args:
        folder: Of the model.
        table: Markdown.
    """
    file = folder / CARD_FILE
    if not file.is_file() or MEASURED not in (text := file.read_text()):
        return
    before, _, rest = text.partition(MEASURED)
    _, heading, after = rest.partition("\n## ")
    file.write_text(f"{before}{MEASURED}\n\n{table}\n{heading}{after}")


CARD_SETTINGS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "reg_weight",
    "penalty_weight",
    "train_text_model",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


class SafePublishing(_Base):
    """What a trainer writes: weights in safetensors, processor, arguments as JSON without secrets, a card.

    Trainer pickles its arguments, the Hub token in clear, beside every model that it saves and pushes. Its
    `_save` and `_push_from_checkpoint` are replaced here for that reason.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)
        text = json.dumps(redacted(self.args.to_dict()), indent=2, sort_keys=True, default=str)
        Path(folder, TRAINING_ARGS_FILE).write_text(text + "\n")

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card into the output folder.

        Args:
            model_name: Name of the model; the folder's by default.
            **kwargs: `tags` to add to the metadata; the rest of what `Trainer.create_model_card` takes is unused.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        evaluations = [log for log in self.state.log_history if any(key.startswith("eval_") for key in log)]
        last = [log for log in evaluations if log["step"] == evaluations[-1]["step"]]
        metrics = {k: float(v) for log in last for k, v in log.items() if k.startswith("eval_")}
        card = model_card(
            self.args.hub_model_id or model_name or folder.name,
            self.args.base_model_id or self.encoder.config.name_or_path or "CLIPModel",
            self.args.loss_type,
            {name: self.args.to_dict()[name] for name in CARD_SETTINGS},
            {k: v for k, v in metrics.items() if not k.endswith(("_runtime", "_per_second"))},
            kind="concept" if self.concept else "adapter" if isinstance(model, PeftModel) else "model",
            report=_report_table(folder),
        )
        tags = kwargs.get("tags") or []
        card.data.tags = [*card.data.tags, *([tags] if isinstance(tags, str) else tags)]
        card.save(folder / CARD_FILE)

    _unpublished: str | None = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._unpublished = checkpoint_folder  # Trainer asks before callbacks have written their part, and the mark

    def publish_checkpoint(self) -> None:
        """Push the checkpoint that was written last, as `hub_strategy` says; a Hub out of reach costs a warning."""
        folder, self._unpublished = self._unpublished, None
        if folder is None or self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self._push(folder)
        except Exception as error:  # whatever it is, hours of training are not to end for it
            logger.warning(
                f"The checkpoint {folder!r} could not be pushed to {self.hub_model_id!r} "
                f"({type(error).__name__}: {redacted(str(error))}). It is whole on the disk, and training goes on."
            )

    def _push(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        message = f"Training in progress, step {self.state.global_step}"
        self.push_to_hub(commit_message=message, revision=self.args.hub_revision)
        if strategy != HubStrategy.EVERY_SAVE and self.is_world_process_zero():
            last = strategy == HubStrategy.CHECKPOINT
            huggingface_hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
