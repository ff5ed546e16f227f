"""A tiny CLIP, small datasets and short runs, and what tests compare of them."""

import functools
import inspect

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from clip_po.concept import ConceptConfig, ConceptTrainer
from clip_po.config import ContrastivePOConfig
from clip_po.data.attacks.attack import TypographicAttack
from clip_po.data.typographic_preferences import TypographicPreferences
from clip_po.trainer import ContrastivePOTrainer

# transformers 5.23 renamed gradient_checkpointing and warns about the old name.
NEW_NAME = "activation_checkpointing"
CHECKPOINTING = NEW_NAME if hasattr(TrainingArguments, NEW_NAME) else "gradient_checkpointing"

CLASSES = ["cat", "dog", "bird", "ship"]
PROMPTS = [f"a photo of a {name}" for name in CLASSES]
IMAGE_SIZE = 32


def tiny_config(vision=None, **overrides):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return CLIPConfig(
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 8, **(vision or {})},
        projection_dim=16,
        **overrides,
    )


def tiny_processor(size=IMAGE_SIZE):
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=32
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def picture(number: int, side: int = IMAGE_SIZE) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def make_labelled(rows: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [picture(i) for i in range(rows)], "label": [i % len(CLASSES) for i in range(rows)]}
    return datasets.Dataset.from_dict(columns, features=features)


def typographic(rows=16, **attack):
    """Preferences on the labelled rows, with words drawn on their images."""
    style = {"min_side": IMAGE_SIZE, "size": (0.3, 0.5), **attack}
    return TypographicPreferences(make_labelled(rows), TypographicAttack(words=CLASSES, **style))


def write_parquet(folder, **splits: int):
    """Write labelled rows as a data set of Parquet files, with a number of rows for each split."""
    for split, rows in splits.items():
        make_labelled(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def make_preferences(rows: int) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "clean_image": datasets.Image(),
            "chosen": datasets.Value("string"),
            "rejected": datasets.Value("string"),
        }
    )
    columns = {
        "image": [picture(1000 + i) for i in range(rows)],
        "clean_image": [picture(i) for i in range(rows)],
        "chosen": [PROMPTS[i % 4] for i in range(rows)],
        "rejected": [PROMPTS[(i + 1 + i % 3) % 4] for i in range(rows)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def make_image_pairs(rows: int, rejected: int = 1, texts=PROMPTS) -> datasets.Dataset:
    """Preferences between images: one text, a chosen image, and one or several rejected ones."""
    several = datasets.List(datasets.Image()) if rejected > 1 else datasets.Image()
    features = {"text": datasets.Value("string"), "chosen_image": datasets.Image(), "rejected_image": several}
    others = [[picture(3000 + 10 * i + n) for n in range(1 + i % rejected)] for i in range(rows)]
    columns = {
        "text": [texts[i % len(texts)] for i in range(rows)],
        "chosen_image": [picture(2000 + i) for i in range(rows)],
        "rejected_image": others if rejected > 1 else [images[0] for images in others],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def make_unpaired(rows: int) -> datasets.Dataset:
    """Images with a text that is right in two rows of three."""
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("bool")}
    columns = {
        "image": [picture(i) for i in range(rows)],
        "text": [PROMPTS[i % 4] for i in range(rows)],
        "label": [i % 3 != 0 for i in range(rows)],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def make_captioned(rows: int) -> datasets.Dataset:
    """Ordinary images with texts, for a regularization in both directions."""
    texts = [f"picture {chr(97 + i % 5)}" for i in range(rows)]
    return datasets.Dataset.from_dict(
        {"image": [picture(5000 + i) for i in range(rows)], "text": texts},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )


def run_config(folder, config=ContrastivePOConfig, **arguments):
    """A short and silent run on the CPU; `arguments` win."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return config(**{"output_dir": str(folder), "per_device_train_batch_size": 4, **quiet, **arguments})


TRAINER_ARGUMENTS = set(inspect.signature(ContrastivePOTrainer).parameters)


def make_trainer(model, folder, args=None, concept=None, **arguments):
    """A trainer for a short and silent run. What it does not take itself goes to its configuration."""
    if concept is None:
        trainer, config = ContrastivePOTrainer, ContrastivePOConfig
    else:
        trainer, config = functools.partial(ConceptTrainer, concept=concept), ConceptConfig
    own = {name: arguments.pop(name) for name in TRAINER_ARGUMENTS & set(arguments)}
    own.setdefault("candidate_texts", PROMPTS)
    if "train_dataset" not in own:
        own["train_dataset"] = make_preferences(13)
    return trainer(model, args=args or run_config(folder, config, **arguments), **own)


class StopAt(TrainerCallback):
    """Ends a training before its last step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first, second):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


SCENE_CLASSES = ("cat", "dog", "car")


def make_scenes(rows: int = 13) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)) for _ in range(rows)]
    return datasets.Dataset.from_dict(
        {
            "image": pictures,
            "label": [row % 3 for row in range(rows)],
            "scene": [f"scene {row // 4}" for row in range(rows)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=list(SCENE_CLASSES)),
                "scene": datasets.Value("string"),
            }
        ),
    )


TINY_RUN = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "2"]
TINY_RUN += ["--per_device_train_batch_size", "4"]
"""Flags of a command that trains, for a short run."""
