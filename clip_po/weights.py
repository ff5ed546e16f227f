"""The weights of a model before they are changed: in memory, on one device and in float32."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_in_memory(model: nn.Module, name: str = "model") -> None:
    """Raise if weights of a model are offloaded, or on several devices.

    Args:
        model: The model.
        name: Name of the model in messages.

    Raises:
        ValueError: If a weight is not in memory, or weights are on different devices.
    """
    away = [n for n, p in model.named_parameters() if p.is_meta]
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if away or len(devices) > 1:
        problem = f"{len(away)} weights of {name} are not in memory, such as {away[0]!r}"
        if not away:
            problem = f"the weights of {name} are on several devices, {devices}"
        raise ValueError(
            f"{problem[0].upper()}{problem[1:]}: a device_map offloads or spreads them, so that they can't be "
            "changed. Load the model without device_map; a trainer moves it to its device."
        )


def to_float32(model: nn.Module, name: str = "model") -> None:
    """Convert the 16-bit weights of a model to float32, and say so.

    An optimizer step on them leaves nan in float16, and is mostly rounded away in bfloat16.

    Args:
        model: The model. Changed in place, with its configuration.
        name: Name of the argument, for the message.
    """
    narrow = [p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    if not narrow:
        return
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in narrow}))
    logger.warning(
        f"{name} is in {dtypes}: converted to float32 to be trained. For 16-bit computation, set bf16=True."
    )
    for parameter in narrow:
        parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.dtype = torch.float32  # transformers loads a saved model in this dtype
