"""Arguments of `clip-po convert`."""

from __future__ import annotations

from dataclasses import dataclass, field

TRANSFORMERS, OPEN_CLIP = "transformers", "open_clip"
"""Values of --to: the library that loads the result."""


@dataclass
class ConvertArguments:
    """Arguments of `clip-po convert`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The checkpoint: a file of weights of open_clip (.safetensors, .pt or .bin) or its folder; with "
            "--to open_clip, a folder or a Hub id of a CLIPModel or of its adapters, which are merged."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the converted checkpoint is written: an empty or new folder."}
    )
    to: str = field(
        default=TRANSFORMERS,
        metadata={"help": "The library that loads the result.", "choices": [TRANSFORMERS, OPEN_CLIP]},
    )
    arch: str | None = field(
        default=None,
        metadata={
            "help": "Architecture of an open_clip checkpoint: its name there, such as ViT-B-32-quickgelu, or the JSON "
            "file of its configuration; default: open_clip_config.json beside the weights."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id with the tokenizer of an open_clip checkpoint; default: the tokenizer beside "
            "the weights, else CLIP's own from openai/clip-vit-base-patch32."
        },
    )

    def __post_init__(self) -> None:
        """Raise if arguments can't work, before anything is read.

        Raises:
            ValueError: If a required argument is missing, or one has no effect.
        """
        for name in ("model_name_or_path", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing. clip-po convert --help lists the flags.")
        idle = [name for name in ("arch", "tokenizer") if getattr(self, name) is not None]
        if self.to == OPEN_CLIP and idle:
            raise ValueError(
                f"--{idle[0]} has no effect with --to {OPEN_CLIP}: the checkpoint has its own. Leave it out."
            )
