"""How far two computations of the same numbers may differ because of rounding alone.

The last bits of a sum depend on the order of its terms, and so on the processor, the number of threads and the shape
of the batch. Two results are the same bit for bit only where the same kernel ran on the same shapes with the same
number of threads. Everything else is compared within `rounding`: batched with one by one, padded with unpadded, one
process with two, accumulated micro-batches with one batch, eager attention with sdpa.
"""

import torch

TINY_CLIP = 64
"""Roundings along a pass of the tiny CLIP: two blocks of about ten operations, each a sum of up to 64 terms.

The errors have random signs, so that a sum of 64 terms adds about 3 of them.
"""
LOGIT_SCALE = 14.3
"""exp(2.6592), CLIP's initial scale of the cosines: the size of the tiny CLIP's logits."""
TRAINING = 16
"""How much errors grow in a short run: over its steps, and in gradients that are differences of two texts'."""


def rounding(scale=1.0, depth=TINY_CLIP, dtype=torch.float32):
    """The largest absolute difference that rounding explains.

    Args:
        scale: Largest magnitude among the numbers that are computed with. A small result of large numbers has the
            error of the large ones: a log-probability that of the logits, which are up to `logit_scale`.
        depth: Number of roundings, one after the other.
        dtype: Of the computation.
    """
    return depth * torch.finfo(dtype).eps * scale


LOGPS = rounding(scale=LOGIT_SCALE)
"""Of log-probabilities of the tiny CLIP, and of losses and metrics made of them."""
RUNS = rounding(depth=TINY_CLIP * TRAINING)
"""Relative, of what a short run added to weights, and of its gradients."""


def largest(tensors):
    """The largest magnitude in some tensors."""
    return max(tensor.abs().max().item() for tensor in tensors)
