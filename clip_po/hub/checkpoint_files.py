"""Checks of the files of a checkpoint before they are read: inside its folder, and of sizes that can be meant."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from clip_po.bounded_text import parse_json
from clip_po.data.path_safety import check_inside, check_link

TEXTS = frozenset(
    {
        "adapter_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        SAFE_WEIGHTS_INDEX_NAME,
    }
)
"""Names of the texts that transformers and PEFT read."""

CONCEPT_FILE = "concept.safetensors"
"""Name of the file that `ConceptTransform.save` writes."""

MAX_TEXT = 100 * 2**20
"""Largest size of a configuration, vocabulary or template, in bytes."""

LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "projection_dim": 100_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000,
    "image_size": 10_000,
    "patch_size": 10_000,
    "num_channels": 1_000,
}
"""Largest sizes in a config.json, well above those of any published CLIP."""

MOST_ABOVE = 10
"""A config.json that describes more than this many times the stored weights is refused before memory is filled."""


def check_files(name: str | os.PathLike[str]) -> None:
    """Raise if reading the files of a local checkpoint could hang, fill the memory or read files elsewhere.

    Args:
        name: Folder of a model, adapters or a processor. A Hub id is not checked: the Hub's client downloads single
            files into its own cache.

    Raises:
        ValueError: If a file is a link out of the folder, not a regular file, too large, or not readable as JSON, or
            if an index names a file outside the folder, a pickle, or a file that does not exist.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_dir() or (file.name not in TEXTS and file.suffix != ".safetensors"):
            continue
        check_link(file, folder, "checkpoint")
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is not a regular file. Copy or download the checkpoint again.")
        if file.name in TEXTS and file.stat().st_size > MAX_TEXT:
            raise ValueError(
                f"{str(file)!r} has {file.stat().st_size:,} bytes, more than the {MAX_TEXT:,} of any configuration, "
                "vocabulary or template. Copy or download the checkpoint again."
            )
        if file.suffix == ".json":
            _parsed(file)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():  # otherwise transformers does not read it
        _check_index(index)


def _parsed(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file.name} of {str(file.parent)!r} is not readable as JSON ({error}). Copy or download it again."
        ) from error


def _check_index(index: Path) -> None:
    found = _parsed(index)
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{str(index)!r} has no weight_map from weights to files. Copy or download it again.")
    for shard in sorted(set(shards.values())):
        check_inside(shard, str(index), "checkpoint")
        if not shard.endswith(".safetensors"):
            raise ValueError(
                f"{str(index)!r} names the file {shard!r}, but weights are read from safetensors only: a pickle can "
                "run any program. Convert the checkpoint with its author's program."
            )
        if not (index.parent / shard).is_file():
            raise ValueError(
                f"{str(index)!r} names the file {shard!r}, which does not exist. Copy or download it again."
            )
        check_link(index.parent / shard, index.parent, "checkpoint")


def check_config(name: str, written: Mapping[str, Any]) -> None:
    """Raise if a config.json describes a model that is larger than `LIMITS` or than its weights.

    Args:
        name: Folder or Hub id. The size of the weights is only known in a folder.
        written: Content of its config.json. Its model_type is that of a supported model; "clip" if it names none.

    Raises:
        ValueError: If a size is not a whole number from 1 to its limit, or the model is `MOST_ABOVE` times
            larger than the files.
    """
    try:
        config = CONFIG_MAPPING[written.get("model_type", "clip")].from_dict(dict(written))
    except Exception as error:  # transformers raises errors of several kinds for values of a wrong type
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The config.json of {name!r} is not that of a CLIPModel or another two-tower model ({reason}). "
            "Correct it."
        ) from error
    for part in (config, config.text_config, config.vision_config):
        for field, most in LIMITS.items():
            size = getattr(part, field, 1)
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
                raise ValueError(
                    f"The config.json of {name!r} has {field}={size!r}, but it must be a whole number from 1 to "
                    f"{most:,}. Correct it, or download it again."
                )
    stored, described = _stored(Path(name)), _parameters(config)
    if 0 < MOST_ABOVE * stored < described:  # loading itself names what is missing when it is less
        raise ValueError(
            f"The weights of {name!r} do not match its config.json: it describes a model of at least {described:,} "
            f"weights, but the files hold {stored:,}. Copy or download the checkpoint again, config.json and "
            "weights together."
        )


def _stored(folder: Path) -> int:
    """Return the number of weights in the files of a folder; 0 if there are none, or if none is readable."""
    return sum(math.prod(shape) for file in folder.glob("*.safetensors") for shape in _shapes(file))


def _shapes(file: Path) -> list[list[int]]:
    """Return the shapes in a safetensors file; none if it is not readable, which loading says better."""
    try:
        with safe_open(file, framework="pt") as opened:
            return [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
    except SafetensorError:
        return []


def _parameters(config: PreTrainedConfig) -> int:
    """Return a lower bound of the number of weights: embeddings, attention and MLPs of transformers.

    A tower of another family, as in VisionTextDualEncoder, may share weights among its layers and does not count.
    """
    text, vision = config.text_config, config.vision_config
    rows = [(text, text.vocab_size + text.max_position_embeddings)]
    if hasattr(vision, "patch_size"):
        rows.append((vision, _patches(vision) + vision.num_channels * vision.patch_size**2))
    return sum(
        tower.hidden_size
        * (embedded + tower.num_hidden_layers * (4 * tower.hidden_size + 2 * getattr(tower, "intermediate_size", 0)))
        for tower, embedded in rows
        if tower.model_type.startswith(config.model_type)
    )


def _patches(vision: PreTrainedConfig) -> int:
    """Return the number of position embeddings of a vision transformer."""
    return vision.num_patches if hasattr(vision, "num_patches") else (vision.image_size // vision.patch_size) ** 2


def check_rank(name: str, config: PeftConfig) -> None:
    """Raise if adapters of a local folder claim a rank that no weight in their file has.

    Args:
        name: Folder or Hub id. Only a folder is checked.
        config: Their configuration.

    Raises:
        ValueError: If the rank is larger than every size in the file.
    """
    file = Path(name, SAFETENSORS_WEIGHTS_NAME)
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    claimed = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if not claimed or not file.is_file():
        return
    most = max((size for shape in _shapes(file) for size in shape), default=0)
    if 0 < most < claimed:
        raise ValueError(
            f"The adapters in {name!r} have r={claimed} in their adapter_config.json, but no weight in their file is "
            f"larger than {most}. Copy or download the adapters again."
        )
