"""Generator of the help pages in assets/help, so that `--help` does not import the packages of the commands.

`COMMAND.txt` has all flags and `COMMAND-short.txt`, where there are many, the flags that matter most.

Run `python -m clip_po.cli.help` after changing a flag.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig

from clip_po.cli.compare_arguments import CompareArguments
from clip_po.cli.convert_arguments import ConvertArguments
from clip_po.cli.demo import DemoArguments
from clip_po.cli.evaluate_arguments import EvaluateArguments
from clip_po.cli.main import COMMANDS
from clip_po.cli.score_arguments import ScoreArguments
from clip_po.cli.steer_arguments import DEFAULTS as STEER_DEFAULTS
from clip_po.cli.steer_arguments import SteerArguments
from clip_po.cli.train_arguments import DEFAULTS as TRAIN_DEFAULTS
from clip_po.cli.train_arguments import METHOD, TrainArguments
from clip_po.concept.trainer import ConceptConfig
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
"""Inherited arguments that the commands do not use."""

EXAMPLES = {
    "train": """\
clip-po train --model_name_or_path openai/clip-vit-base-patch32 --dataset_name cifar10 \\
    --image_column img --output_dir aligned
clip-po train --config recipe.yaml --learning_rate 1e-5
accelerate launch --no-python clip-po train ...   (several processes)""",
    "evaluate": """\
clip-po evaluate --model_name_or_path aligned --base_model_name_or_path openai/clip-vit-base-patch32 \\
    --dataset_name cifar10 --image_column img
clip-po evaluate --model_name_or_path aligned --dataset_name preferences.jsonl --dataset_test_split train
clip-po evaluate --model_name_or_path aligned --suite typographic --suite_folder sets""",
    "score": """\
clip-po score --model_name_or_path aligned --dataset_name path/to/images --text "a photo of a cat" --top_k 10
clip-po score --model_name_or_path aligned --dataset_name rows.jsonl --output_file scores.parquet
accelerate launch --no-python clip-po score ...   (several processes)""",
    "compare": """\
clip-po compare --config examples/compare.yaml --output_dir comparison""",
    "steer": """\
clip-po steer --output_dir steered   (the embedded digits)
clip-po steer --model_name_or_path openai/clip-vit-base-patch32 --dataset_name cifar10 \\
    --image_column img --output_dir steered --choose at_most --max_clean_cost 0.5
clip-po steer --transform steered --t -1 0 0.5 1 2 --output_dir swept   (without training)""",
    "convert": """\
clip-po convert --model_name_or_path ViT-B-32.safetensors --arch ViT-B-32 --output_dir converted
clip-po convert --model_name_or_path aligned --to open_clip --output_dir aligned-open-clip""",
    "demo": """\
clip-po demo --output_dir demo_output""",
}


REMARKS = {
    "evaluate": """\
The columns of the dataset decide what is measured. image, label: clean and typographic accuracy. image,
chosen, rejected, or text, chosen_image, rejected_image: agreement with the preferences. image, text,
label (true or false): right against wrong texts. image, caption or text: retrieval.""",
    "train": """\
Learning rate and epochs default to values that fit the size of the model and the data. Flags override
the YAML file, which overrides --preset.""",
    "compare": """\
The recipe names the methods with their settings (flags of clip-po train, or method: and its arguments),
the attacks to measure under, and the training flags that all trained methods share. A comparison that
was stopped continues where it stopped: each method and seed runs once.""",
}
"""Text between the examples and the flags."""

MAIN_FLAGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "train": {
        "Model and data": [
            "model_name_or_path",
            "dataset_name",
            "image_column",
            "label_column",
            "class_names",
            "prompt_template",
        ],
        "Output": ["output_dir", "overwrite_output_dir", "resume_from_checkpoint"],
        "The method": ["preset", "loss_type", "reg_weight", "reg_dataset_name", "labels", "max_clean_cost"],
        "Training": ["learning_rate", "num_train_epochs", "per_device_train_batch_size", "use_peft", "seed"],
    },
    "evaluate": {
        "Models and data": [
            "model_name_or_path",
            "base_model_name_or_path",
            "dataset_name",
            "dataset_test_split",
            "image_column",
            "label_column",
            "caption_column",
            "class_names",
            "prompt_template",
        ],
        "Output": ["output_dir"],
        "What is measured": ["renderings", "retention", "suite", "suite_folder", "fairness", "cluster_column"],
        "The run": ["batch_size", "on_bad_image", "max_samples", "seed"],
    },
    "steer": {
        "Model and data": [
            "model_name_or_path",
            "dataset_name",
            "image_column",
            "label_column",
            "class_names",
            "prompt_template",
        ],
        "Output": ["output_dir", "overwrite_output_dir"],
        "The scale t": ["t", "choose", "max_clean_cost", "transform", "towers"],
        "The method": ["loss_type", "beta", "reg_weight", "penalty_weight"],
        "Training": ["learning_rate", "num_train_epochs", "seed"],
    },
}
"""The twenty flags of a command that matter most, by heading. The commands without an entry have few flags."""

ARGUMENTS: Mapping[str, type] = {
    "train": TrainArguments,
    "evaluate": EvaluateArguments,
    "compare": CompareArguments,
    "steer": SteerArguments,
}
"""Dataclass of the flags for data and attack."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"train": {**TRAIN_DEFAULTS, **METHOD}, "steer": STEER_DEFAULTS}
"""Defaults of the commands that train, where they differ from the defaults of the dataclasses."""


def own_fields(cls: type, *bases: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass that its given bases do not have, without unused ones.

    Args:
        cls: The dataclass.
        *bases: Dataclasses that it inherits from.

    Returns:
        The fields.
    """
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    return [
        field
        for field in dataclasses.fields(cls)
        if field.name not in inherited | UNUSED and not field.name.startswith(("bnb_", "use_bnb_")) and field.init
    ]


def describe(field: dataclasses.Field[Any], default: Any) -> str:
    """Format a flag with its meaning and its default.

    Args:
        field: The field of the flag.
        default: Its default.

    Returns:
        One or more lines, without a newline at the end.
    """
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


def default_of(field: dataclasses.Field[Any], overrides: Mapping[str, Any]) -> Any:
    """Return the default of a flag.

    Args:
        field: The field of the flag.
        overrides: Defaults of the command that differ from the defaults of the dataclass, by name.

    Returns:
        The default; None if the flag has none.
    """
    if field.name in overrides:
        return overrides[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def sections(command: str) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the fields of the flags of a command, by heading.

    Args:
        command: One of `COMMANDS`.

    Returns:
        The fields.
    """
    if command == "demo":
        return {"The demo": own_fields(DemoArguments)}
    if command == "convert":
        return {"Checkpoint and output": own_fields(ConvertArguments)}
    if command == "score":
        return {"Data and output": own_fields(ScoreArguments)}
    found = {"Data and attack": own_fields(ARGUMENTS[command])}
    if command in DEFAULTS:
        config = ConceptConfig if command == "steer" else ContrastivePOConfig
        found["The method"] = own_fields(config, TrainingArguments)
        if command == "train":
            found["Model and LoRA"] = own_fields(ModelConfig)
        # Taken from the configuration, which changes some of the defaults.
        method = {field.name for field in found["The method"]}
        inherited = [field for field in own_fields(config) if field.name not in method]
        found["Training (as transformers.TrainingArguments)"] = inherited
    return found


def page(command: str) -> str:
    """Build the help page of a command, with all of its flags.

    Args:
        command: One of `COMMANDS`.

    Returns:
        The page.
    """
    return _page(command, sections(command))


def short_page(command: str) -> str:
    """Build the help page of a command, with the flags that matter most.

    Args:
        command: One of `MAIN_FLAGS`.

    Returns:
        The page. Its last line says how many flags it leaves out.
    """
    fields = {field.name: field for found in sections(command).values() for field in found}
    shown = {title: [fields[name] for name in names] for title, names in MAIN_FLAGS[command].items()}
    others = len(fields) - sum(map(len, shown.values()))
    return _page(command, shown) + f"\nclip-po {command} --help-all lists the other {others} flags too.\n"


def _page(command: str, flags: Mapping[str, Sequence[dataclasses.Field[Any]]]) -> str:
    overrides = DEFAULTS.get(command, {})
    parts = [
        f"usage: clip-po {command} [--flag value ...] [--config file.yaml]",
        COMMANDS[command],
        textwrap.indent(EXAMPLES[command], "  "),
        *([REMARKS[command]] if command in REMARKS else []),
    ]
    for title, fields in flags.items():
        parts.append(f"{title}:\n" + "\n".join(describe(f, default_of(f, overrides)) for f in fields))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write all help pages."""
    folder = Path(str(files("clip_po").joinpath("assets", "help")))
    folder.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        (folder / f"{command}.txt").write_text(page(command))
    for command in MAIN_FLAGS:
        (folder / f"{command}-short.txt").write_text(short_page(command))


if __name__ == "__main__":
    main()
