"""Attention over packed documents: each attends to itself only."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, causal: bool, scale: float
) -> torch.Tensor:
    """Run softmax attention inside each document of a packed batch.

    Args:
        q: [T, A, D] queries.
        k: [T, A, D] keys.
        v: [T, A, D] values.
        cu_seqlens: [N+1] int offsets of the documents, from 0 to T. Offsets in host memory spare a device
            synchronisation.
        causal: a token attends to itself and to what precedes it; otherwise to its whole document.
        scale: factor of the scores before the softmax.

    Returns:
        [T, A, D].
    """
    documents = [
        _attention(q[start:stop], k[start:stop], v[start:stop], causal=causal, scale=scale)
        for start, stop in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(documents)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """Attend within one document, [L, A, D] -> [L, A, D]."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out[0].transpose(0, 1)
