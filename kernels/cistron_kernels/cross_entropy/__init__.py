"""Weighted cross-entropy as two sums, and log-probabilities of targets without their logits."""

from __future__ import annotations

from typing import Final, NoReturn

import torch

from cistron_kernels.checks import can_look_at, check_floating, check_same_device, refuse
from cistron_kernels.cross_entropy import reference
from cistron_kernels.dispatch import takes_triton

__all__ = ["cross_entropy", "score_logprob"]

_MOST_CLASSES: Final = 1024
"""The kernel of `cross_entropy` holds a row of logits in registers; PyTorch takes wider ones."""
_MOST_SCORED_CLASSES: Final = 512
"""The same of `score_logprob`, which holds them in the accumulators of a matrix product."""


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the weighted negative log-likelihood of the targets, in nats.

    The mean is left to the caller: averaging the means of ranks or micro-batches with different numbers of targets is
    biased, dividing the sum of sums by the sum of weights is not.

    Args:
        logits: [T, V].
        targets: [T] int64 class ids; `ignore_index` marks positions without a target. An id outside of the vocabulary
            is refused in host memory. On a GPU, where looking would mean waiting, it makes the loss NaN.
        weights: [T] weight of each position, constants without a gradient; None for ones.
        ignore_index: the id that stands for "no target".

    Returns:
        The scalars sum of weight times loss, and sum of weights, over the positions that have a target; fp32 or better.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
    """
    if logits.dim() != 2 or (weights is not None and weights.shape != logits.shape[:1]):
        refuse("cross_entropy", "logits must be [T, V], weights [T]", logits=logits, targets=targets, weights=weights)
    _check("cross_entropy", targets, logits=logits, weights=weights)
    wide = torch.promote_types(logits.dtype, torch.float32)
    has_target = targets != ignore_index
    scored = has_target.to(wide) if weights is None else has_target * weights.detach().to(wide)
    if takes_triton("cross_entropy", logits) and logits.shape[1] <= _MOST_CLASSES:
        from cistron_kernels.cross_entropy import kernel

        _check_ids("cross_entropy", targets, logits.shape[1], ignore_index)
        losses = kernel.cross_entropy(logits, targets, scored, ignore_index)
    elif can_look_at(targets):
        try:
            losses = reference.losses_of_known(logits, targets, scored, ignore_index=ignore_index)
        except IndexError:  # Torch looks at every id anyway.
            _refuse_ids("cross_entropy", targets, logits.shape[1])
    else:
        losses = reference.cross_entropy(logits, targets, scored, ignore_index=ignore_index)
    return losses.sum(), scored.sum()


@torch.no_grad()
def score_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target under the softmax of ``hidden @ weight.T``, without a gradient.

    The logits of all tokens never exist at once, and are not rounded: sums are fp32.

    Args:
        hidden: [T, H], what the language-model head reads.
        weight: [V, H], the head.
        targets: [T] int64 class ids; one outside of the vocabulary is refused in host memory and NaN on a GPU.

    Returns:
        [T] fp32, natural logarithms.

    Raises:
        ValueError: shapes, dtypes, devices or ids do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        refuse("score_logprob", "hidden must be [T, H], weight [V, H]", hidden=hidden, weight=weight, targets=targets)
    _check("score_logprob", targets, hidden=hidden, weight=weight)
    _check_ids("score_logprob", targets, len(weight), None)
    if takes_triton("score_logprob", hidden, weight) and len(weight) <= _MOST_SCORED_CLASSES:
        from cistron_kernels.cross_entropy import kernel

        return kernel.score_logprob(hidden, weight, targets)
    return reference.score_logprob(hidden, weight, targets)


def _check(op: str, targets: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Check what both ops ask of the targets, one for each row of the first tensor, and of all tensors."""
    first = next(iter(tensors.values()))
    if first is None or targets.shape != first.shape[:1] or targets.dtype != torch.int64:
        refuse(op, "targets must be [T] int64", **tensors, targets=targets)
    check_floating(op, **tensors)
    check_same_device(op, **tensors, targets=targets)


def _check_ids(op: str, targets: torch.Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Refuse ids outside of the vocabulary where they can be looked at."""
    if can_look_at(targets) and not reference.known_ids(targets, num_classes, ignore_index).all():
        _refuse_ids(op, targets, num_classes)


def _refuse_ids(op: str, targets: torch.Tensor, num_classes: int) -> NoReturn:
    refuse(op, f"targets must be ids of {num_classes} classes, and some are not", targets=targets)
