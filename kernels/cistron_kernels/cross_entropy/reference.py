"""Weighted cross-entropy, returned as numerator and denominator.

The mean is left to the caller: averaging the means of ranks or micro-batches with different numbers of targets is
biased, dividing the sum of sums by the sum of weights is not.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the weighted negative log-likelihood of the targets, in nats.

    Args:
        logits: [T, V].
        targets: [T] int64 class ids; `ignore_index` marks positions without a target.
        weights: [T] weight of each position, or None for ones.
        ignore_index: the id that stands for "no target".

    Returns:
        The fp32 scalars sum of weight times loss, and sum of weights, over the positions that have a target.
    """
    losses = functional.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="none")
    scored = (targets != ignore_index).float()
    if weights is not None:
        scored = scored * weights.float()
    return (losses * scored).sum(), scored.sum()
