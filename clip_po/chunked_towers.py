"""Towers that encode a part of a batch at a time, so that thousands of candidates need the memory of one part."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clip_po.dual_encoder import DualEncoder


@contextlib.contextmanager
def in_chunks(encoder: DualEncoder, size: int | None) -> Iterator[None]:
    """Let the towers of a model encode at most `size` inputs at a time, within one call of the model.

    A part keeps nothing for the backward pass but its inputs and is computed again there. The embeddings and their
    gradients are those of the whole batch, except for rounding. Because the model itself is called once, wrappers
    around it, such as DDP, see an ordinary step.

    Args:
        encoder: The model. Its towers are changed inside of the block alone.
        size: Largest number of images or texts in a part; None for no limit.

    Yields:
        Nothing.

    Source: Gao et al. 2021, arXiv 2101.06983, with checkpoints of whole parts in the place of cached gradients.
    """
    if size is None:
        yield
        return
    towers = [encoder.model.get_submodule(names[0]) for names in encoder.towers.values()]
    before = [(tower, vars(tower).get("forward")) for tower in towers]
    for tower in towers:
        tower.forward = functools.partial(_forward, tower.forward, size)
    try:
        yield
    finally:
        for tower, forward in before:
            if forward is None:
                del tower.forward
            else:
                tower.forward = forward


def _forward(whole: Callable[..., Any], size: int, *args: Any, **kwargs: Any) -> Any:
    """Call a tower on parts of its inputs, and put the outputs together.

    Every tensor among the arguments has one entry for each input. Of the last hidden state, only the first position is
    kept: it is the embedding of models that have no pooled output.
    """
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    rows = len(next(iter(tensors.values())))
    if rows <= size:
        return whole(*args, **kwargs)

    def encode(*part: Tensor) -> tuple[Tensor, Tensor | None]:
        given = {**named, **dict(zip(tensors, part, strict=True))}
        places = [given.pop(position) for position in range(len(args))]
        found = whole(*places, **given)
        # A copy, because a view would keep the states of all positions.
        return found.last_hidden_state[:, :1].contiguous(), found.pooler_output

    parts = [
        checkpoint(encode, *(value[start : start + size] for value in tensors.values()), use_reentrant=False)
        for start in range(0, rows, size)
    ]
    states, pooled = zip(*parts, strict=True)
    return BaseModelOutputWithPooling(
        last_hidden_state=torch.cat(states), pooler_output=None if pooled[0] is None else torch.cat(pooled)
    )


def check_chunks(model: nn.Module, size: int | None, *, wrapped: bool) -> None:
    """Raise if a model can't encode its inputs in chunks.

    Args:
        model: The two-tower model.
        size: As for `in_chunks`.
        wrapped: Whether FSDP, DeepSpeed or torch.compile changes how the towers are called.

    Raises:
        ValueError: If chunks were not tried with what wraps the model, or would change its answers.
    """
    if size is None:
        return
    if wrapped:
        raise ValueError(
            f"tower_chunk_size={size} changes how a tower is called, which was not tried with FSDP, DeepSpeed and "
            "torch_compile. Leave one of the two out."
        )
    if any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules()):
        raise ValueError(
            f"tower_chunk_size={size} would change the answers of {type(model).__name__}, which normalizes over the "
            "images of a batch. Leave it out, or use activation_checkpointing=True or gradient_accumulation_steps."
        )
