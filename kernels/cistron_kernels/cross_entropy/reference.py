"""Cross-entropy of each position, and log-probabilities of targets by pieces of tokens."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

_LOGITS_AT_ONCE: Final = 1 << 21
"""Bounds the temporary memory of `score_logprob`: 8 MiB of fp32."""


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, *, ignore_index: int
) -> torch.Tensor:
    """Return weight times negative log-likelihood of each position, in fp32 or better.

    Args:
        logits: [T, V].
        targets: [T] int64; an unknown id makes the loss NaN.
        scored: [T] weights in fp32 or better, zero where there is no target.
        ignore_index: the id that stands for "no target".
    """
    known = known_ids(targets, logits.shape[1], ignore_index)
    losses = losses_of_known(logits, targets.where(known, ignore_index), scored, ignore_index=ignore_index)
    return losses.masked_fill(~known, torch.nan)


def losses_of_known(
    logits: torch.Tensor, targets: torch.Tensor, scored: torch.Tensor, *, ignore_index: int
) -> torch.Tensor:
    """Return the same for targets that are known to be ids, or `ignore_index`."""
    wide = logits.to(scored.dtype)
    return functional.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="none") * scored


def score_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability [T] of the targets under the head `weight` [V, H]; an unknown id makes it NaN."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head, rows = weight.to(wide), max(1, _LOGITS_AT_ONCE // max(len(weight), 1))
    known = known_ids(targets, len(weight), None)
    with torch.autocast(hidden.device.type, enabled=False):
        pieces = [
            functional.linear(part.to(wide), head).log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
            for part, ids in zip(torch.split(hidden, rows), torch.split(targets.where(known, 0), rows), strict=True)
        ]
    return torch.cat(pieces).masked_fill(~known, torch.nan).float()


def known_ids(targets: torch.Tensor, num_classes: int, ignore_index: int | None) -> torch.Tensor:
    """Return where targets are ids of the vocabulary, or the id that marks positions without a target."""
    known = (targets >= 0) & (targets < num_classes)
    return known if ignore_index is None else known | (targets == ignore_index)
