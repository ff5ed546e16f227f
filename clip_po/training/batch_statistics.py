"""Batch normalization during training: always by the statistics of the checkpoint."""

from __future__ import annotations

import types

from torch import nn

NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def keep_batch_statistics(model: nn.Module) -> None:
    """Keep the batch normalization of a model in evaluation mode, also when the model is set to training mode.

    By statistics of the batch, an embedding would depend on the other images of its batch, and the policy would differ
    from the reference before any training. The weights of the layers train like others.

    Args:
        model: The model with its adapters. Changed in place; a copy of it behaves likewise.
    """
    for module in model.modules():
        if isinstance(module, NORMALIZATIONS):
            # A method, not a lambda, so that a copy of the model gets a method bound to the copy.
            module.train = types.MethodType(_evaluate, module)  # type: ignore[method-assign]
            module.eval()


def _evaluate(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
