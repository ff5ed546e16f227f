"""What to do with a model or a dataset of a kind that is not supported: the last sentence of messages about types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel

OPEN_CLIP = "Convert an open_clip checkpoint to the Hugging Face layout first."
EXAMPLE = "for example 'openai/clip-vit-base-patch32'"

WRAPPERS = {
    "OptimizedModule": "Pass the model as it was before torch.compile, and set torch_compile=True in the arguments.",
    "DistributedDataParallel": "The trainer wraps the model itself. Pass model.module.",
    "DataParallel": "The trainer uses one GPU in each process. Pass model.module.",
    "FullyShardedDataParallel": "The trainer shards the model itself. Pass model.module.",
    "SentenceTransformer": "Pass the two-tower model inside, model[0].model, and its processor.",
}
"""Classes around a two-tower model, and how to get at it."""

ONE_TOWER = ("_vision_model", "_text_model")
"""Ends of the model types of a part of a two-tower model."""

OTHER_WAYS: Mapping[str, str] = {
    "blip": "BLIP scores a pair by a text tower that reads the image, and transformers deprecates BlipModel.",
    "blip-2": "BLIP-2 embeds an image as several queries and takes the best of them, so no cosine scores a pair.",
    "aimv2": "transformers computes other text embeddings for AIMv2 with padding than without.",
    "clipseg": "CLIPSeg trains a decoder that segments images. Its two towers are a CLIP checkpoint of their own.",
    "videoprism": "VideoPrism embeds videos, not images.",
}
"""Model types of models with two towers that are not supported, and why."""


def model_remedy(model: Any) -> str:
    """Return what to pass instead of a model that is no supported two-tower model.

    Args:
        model: The value that was passed.

    Returns:
        One or two sentences.
    """
    if isinstance(model, (str, os.PathLike)):
        return f"Load it first, with CLIPModel.from_pretrained({os.fspath(model)!r})."
    if type(model).__name__ in WRAPPERS:
        return WRAPPERS[type(model).__name__]
    if not isinstance(model, nn.Module):
        return f"Load a model with CLIPModel.from_pretrained, {EXAMPLE}."
    if isinstance(model, PreTrainedModel):
        return type_remedy(model.config.model_type)
    return f"Preferences between texts need both towers of a CLIPModel or another two-tower model. {OPEN_CLIP}"


def type_remedy(kind: str) -> str:
    """Return what to use instead of a checkpoint of a model type that is not supported.

    Args:
        kind: `model_type` of its config.

    Returns:
        One to three sentences.
    """
    if kind.endswith(ONE_TOWER):
        return (
            "Preferences between texts need both towers, an image and a text tower, and this is one of them. Load the "
            f"whole checkpoint with AutoModel.from_pretrained. {OPEN_CLIP}"
        )
    if kind == "clip":
        return "Load the same checkpoint with CLIPModel.from_pretrained."
    if kind in OTHER_WAYS:
        return f"{OTHER_WAYS[kind]} Choose a checkpoint of two towers, such as CLIP or SigLIP, {EXAMPLE}."
    return (
        f"A {kind!r} model works in another way than CLIPModel, an image and a text tower. Choose a "
        f"checkpoint of two towers, such as CLIP or SigLIP, {EXAMPLE}."
    )


def dataset_remedy(value: Any, name: str) -> str:
    """Return how to convert data of another kind to a `datasets.Dataset`.

    Args:
        value: The value that was passed.
        name: Name of the argument, for the example.

    Returns:
        One or two sentences.
    """
    module = type(value).__module__.split(".")[0]
    if isinstance(value, (DatasetDict, IterableDatasetDict)):
        splits = list(value)
        return f"Choose one of its splits {splits}, as in {name}=dataset[{splits[0] if splits else 'train'!r}]."
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Dataset):
        return "Join several datasets with datasets.concatenate_datasets(list)."
    if isinstance(value, IterableDataset):
        return (
            "Load it without streaming=True, or keep a part: Dataset.from_list(list(stream.take(1000)), "
            "features=stream.features)."
        )
    if isinstance(value, (str, os.PathLike)):
        return f"Load it first: datasets.load_dataset({os.fspath(value)!r}, split='train')."
    if module == "pandas":
        return (
            "Convert it with datasets.Dataset.from_pandas(frame, preserve_index=False), and columns of paths with "
            "dataset.cast_column('image', datasets.Image())."
        )
    if module == "polars":
        return "Convert it with datasets.Dataset.from_polars(frame)."
    if module == "pyarrow":
        return "Convert it with datasets.Dataset(table)."
    if isinstance(value, torch.utils.data.DataLoader):
        return "The trainer makes the batches itself. Pass the dataset of the loader."
    if isinstance(value, torch.utils.data.IterableDataset):
        return "Convert it with datasets.IterableDataset.from_generator(lambda: iter(dataset)), and set max_steps."
    if isinstance(value, Mapping):
        return "Convert a dictionary of columns with datasets.Dataset.from_dict(columns)."
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (list, tuple)):
        return (
            "Convert it with datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))]) if its rows are "
            "dictionaries, or implement clip_po.data.PreferenceRows to read rows as they are needed."
        )
    return "Convert a list of dicts with Dataset.from_list(rows)."
