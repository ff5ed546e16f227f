"""The help pages: written to assets/help once, so that `--help` imports none of what the commands need.

python -m clip_po.cli.help
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from clip_po.cli.compare import CompareArguments
from clip_po.cli.demo import DemoArguments
from clip_po.cli.evaluate import EvaluateArguments
from clip_po.cli.main import COMMANDS
from clip_po.cli.steer_arguments import DEFAULTS as STEER_DEFAULTS
from clip_po.cli.steer_arguments import SteerArguments
from clip_po.cli.train_arguments import DEFAULTS, TrainArguments
from clip_po.config import ContrastivePOConfig

WIDTH = 100
UNUSED = {
    "dataset_streaming",
    "in_batch_candidates",
    "label_smoothing_factor",
    "ignore_bias_buffers",
    "lora_task_type",
    "lora_target_parameters",
    "load_in_8bit",
    "load_in_4bit",
}
"""Arguments that mean nothing to the commands."""

EXAMPLES = {
    "train": """\
clip-po train --model_name_or_path openai/clip-vit-base-patch32 --dataset_name cifar10 \\
    --image_column img --output_dir aligned
clip-po train --config recipe.yaml --learning_rate 1e-5
accelerate launch --no-python clip-po train ...   (several processes)""",
    "evaluate": """\
clip-po evaluate --model_name_or_path aligned --base_model_name_or_path openai/clip-vit-base-patch32 \\
    --dataset_name cifar10 --image_column img
clip-po evaluate --model_name_or_path aligned --suite typographic --suite_folder sets""",
    "compare": """\
clip-po compare --config examples/compare.yaml --output_dir comparison""",
    "steer": """\
clip-po steer --output_dir steered   (the embedded digits)
clip-po steer --model_name_or_path openai/clip-vit-base-patch32 --dataset_name cifar10 \\
    --image_column img --output_dir steered --choose at_most --max_clean_cost 0.5
clip-po steer --transform steered --t -1 0 0.5 1 2 --output_dir swept   (without training)""",
    "demo": """\
clip-po demo --output_dir demo_output""",
}


def own_fields(cls: type, *without: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that those it is derived from don't have."""
    inherited = {field.name for base in without for field in dataclasses.fields(base)}
    return [
        field
        for field in dataclasses.fields(cls)
        if field.name not in inherited | UNUSED and not field.name.startswith(("bnb_", "use_bnb_")) and field.init
    ]


def describe(field: dataclasses.Field[Any], default: Any) -> str:
    """A flag, its meaning and its default."""
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    first = re.split(r"(?<=[.;:])\s(?=[A-Z])", text)[0].rstrip(".")
    choices = field.metadata.get("choices")
    if choices:
        first += f" ({', '.join(map(str, choices))})"
    if default not in (None, "") and "default" not in first:
        value = " ".join(map(str, default)) if isinstance(default, list) else default
        first += f" [default: {value.value if isinstance(value, Enum) else value}]"
    flag = f"  --{field.name}"
    lines = textwrap.wrap(first, WIDTH - 30) or [""]
    head = f"{flag:<30}{lines[0]}" if len(flag) < 29 else f"{flag}\n{'':<30}{lines[0]}"
    return "\n".join([head.rstrip(), *(f"{'':<30}{line}" for line in lines[1:])])


def default_of(field: dataclasses.Field[Any], overrides: dict[str, Any]) -> Any:
    """What a flag is when it is not given."""
    if field.name in overrides:
        return overrides[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def page(command: str) -> str:
    """The help page of a command."""
    sections: dict[str, list[dataclasses.Field[Any]]]
    if command == "demo":
        sections = {"The demo": own_fields(DemoArguments)}
    else:
        task = {
            "train": TrainArguments,
            "evaluate": EvaluateArguments,
            "compare": CompareArguments,
            "steer": SteerArguments,
        }[command]
        sections = {"Data and attack": [*own_fields(ScriptArguments), *own_fields(task, ScriptArguments)]}
    overrides: dict[str, Any] = {}
    if command in ("train", "steer"):
        overrides = dict(DEFAULTS if command == "train" else STEER_DEFAULTS)
        sections["The method"] = own_fields(ContrastivePOConfig, TrainingArguments)
        if command == "train":
            sections["Model and LoRA"] = own_fields(ModelConfig)
        # As ContrastivePOConfig has them: with its defaults.
        own = {field.name for field in sections["The method"]}
        inherited = [field for field in own_fields(ContrastivePOConfig) if field.name not in own]
        sections["Training (as transformers.TrainingArguments)"] = inherited
    parts = [
        f"usage: clip-po {command} [--flag value ...] [--config file.yaml]",
        COMMANDS[command],
        textwrap.indent(EXAMPLES[command], "  "),
    ]
    if command == "train":
        parts.append(
            "Learning rate and epochs fit the size of the model and of the data where they are not given; flags win\n"
            "over the YAML file, which wins over --preset."
        )
    if command == "compare":
        parts.append(
            "The recipe names the methods, their settings (as flags of clip-po train, or method: and what it takes),\n"
            "the attacks they are measured under, and the training that all share. A comparison that was stopped\n"
            "goes on where it was: each method and seed runs once."
        )
    for title, fields in sections.items():
        parts.append(f"{title}:\n" + "\n".join(describe(f, default_of(f, overrides)) for f in fields))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write every page."""
    folder = Path(str(files("clip_po").joinpath("assets", "help")))
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        (folder / f"{command}.txt").write_text(page(command))


if __name__ == "__main__":
    main()
