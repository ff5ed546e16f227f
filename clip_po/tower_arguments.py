"""The arguments that say what of the two towers trains, and how fast: a part of `ContrastivePOConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clip_po.validation import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, Allowed, check_number

TOWER_NUMBERS: Mapping[str, Allowed] = {
    "trainable_layers": COUNT_OR_NONE,
    "vision_learning_rate": NOT_NEGATIVE,
    "text_learning_rate": NOT_NEGATIVE,
    "tower_chunk_size": COUNT,
    "layer_decay": Allowed("lie in (0, 1]", lambda number: 0 < number <= 1),
}
"""Values that numeric arguments may have. None is allowed too."""


@dataclass
class TowerArguments:
    """Arguments that say what of the two towers trains, and how fast.

    Args:
        > The towers

        train_vision_model (`bool`, defaults to `True`): Train the vision tower with its projection. With `False` and
            `train_text_model=True`, the text tower trains alone, and each fixed image is embedded once.
        train_text_model (`bool`, defaults to `False`): Also train the text tower with its projection.
        train_logit_scale (`bool`, defaults to `False`): Also train the factor of the cosines, `logit_scale`
            or `temperature`, up to 100 in CLIP, and the bias with `policy="sigmoid"`.
        trainable_layers (`int`, *optional*): Train only the last blocks of each trained tower, this many, with the
            final norm and the projection; 0 for these two alone. No graph is kept for the layers below. Defaults to
            the whole tower. Parameters that are frozen in the model you pass stay frozen with any of these arguments.
        vision_learning_rate (`float`, *optional*): The initial learning rate of the vision tower, >= 0, with the same
            schedule as `learning_rate`, which is its default. Refused if the tower does not train.
        text_learning_rate (`float`, *optional*): The same for the text tower.
        layer_decay (`float`, *optional*): Factor in (0, 1] of the learning rate from each block of a tower to the
            block below it. The final norm and the projection train at the full rate, the last of n blocks at
            `layer_decay` times the rate, and the embeddings at `layer_decay ** (n + 1)` times. Refused without blocks
            that train.
        tower_chunk_size (`int`, *optional*): Let each tower that trains encode at most so many images or texts of a
            process at a time, and compute each such chunk again in the backward pass. The memory of a step then hardly
            grows with the number of candidates, and the gradients are the same. It costs another forward pass of the
            tower. Defaults to the whole batch at once. Refused with FSDP, DeepSpeed and `torch_compile`.
    """

    train_vision_model: bool = field(default=True, metadata={"help": "Train the vision tower."})
    train_text_model: bool = field(default=False, metadata={"help": "Also train the text tower."})
    train_logit_scale: bool = field(
        default=False, metadata={"help": "Also train the logit scale, or the temperature."}
    )
    trainable_layers: int | None = field(
        default=None,
        metadata={
            "help": "Train only this many last blocks of each trained tower, with final norm and projection; default: "
            "the whole tower."
        },
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the vision tower; default: learning_rate."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the text tower; default: learning_rate."}
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Factor of the learning rate from each block to the block below it, in (0, 1]; default: 1."},
    )

    tower_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Let a trained tower encode at most so many images or texts at a time, and compute them again in "
            "the backward pass, so that memory does not grow with the number of candidates; default: all at once."
        },
    )

    @property
    def learning_rates(self) -> dict[str, float]:
        """The arguments that were given beside `learning_rate`, by name."""
        given = {name: getattr(self, name) for name in ("vision_learning_rate", "text_learning_rate", "layer_decay")}
        return {name: value for name, value in given.items() if value is not None}

    def _check_towers(self) -> None:
        """Raise if nothing trains, or a learning rate is of what does not train."""
        for name, allowed in TOWER_NUMBERS.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), allowed)
        if not (self.train_vision_model or self.train_text_model or self.train_logit_scale):
            raise ValueError(
                "train_vision_model=False leaves nothing to train. Set train_text_model=True or "
                "train_logit_scale=True, or leave train_vision_model out."
            )
        for tower, trains in (("vision", self.train_vision_model), ("text", self.train_text_model)):
            rate = getattr(self, f"{tower}_learning_rate")
            if rate is not None and not trains:
                raise ValueError(
                    f"{tower}_learning_rate={rate!r} has no effect with train_{tower}_model=False. Leave it out, or "
                    f"set train_{tower}_model=True."
                )
        if self.tower_chunk_size is not None and not (self.train_vision_model or self.train_text_model):
            raise ValueError(
                f"tower_chunk_size={self.tower_chunk_size!r} has no effect, because no tower trains. Leave it out."
            )
        blocks = (self.train_vision_model or self.train_text_model) and self.trainable_layers != 0
        if self.layer_decay is not None and not blocks:
            raise ValueError(
                f"layer_decay={self.layer_decay!r} has no effect, because no block of a tower trains. Leave it out."
            )
