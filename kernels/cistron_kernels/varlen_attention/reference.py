"""Attention over packed documents: each attends to itself only."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Final

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from cistron_kernels.checks import checked_offsets

_OLDEST_CAPABILITY: Final = (8, 0)
_LARGEST_HEAD: Final = 256
"""Limits of the flash attention kernels behind torch's ``varlen_attn``, which also wants head sizes in eights."""


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, causal: bool, scale: float
) -> torch.Tensor:
    """Run softmax attention inside each document of packed q, k, v [T, A, D], by torch's own kernels."""
    if has_packed_kernel(q):
        return _in_one_kernel(q, k, v, cu_seqlens, causal=causal, scale=scale)
    parts, start = [], 0
    for length, documents in groupby(cu_seqlens.diff().tolist()):
        stop = start + length * len(list(documents))
        if stop > start:
            run = (tensor[start:stop].reshape(-1, length, *tensor.shape[1:]) for tensor in (q, k, v))
            parts.append(_attention(*run, causal=causal, scale=scale))
        start = stop
    return torch.cat(parts) if parts else torch.empty_like(q)


def has_packed_kernel(q: torch.Tensor) -> bool:
    """Return whether torch has one kernel for all documents of `q` [T, A, D].

    It runs on CUDA from Ampere on, in half precision. Everywhere else documents take turns: on a CPU, where a document
    fills all threads, that costs nothing, and fp32 on a GPU is for checking numbers.
    """
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _LARGEST_HEAD
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(q.device) >= _OLDEST_CAPABILITY
    )


def _in_one_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, causal: bool, scale: float
) -> torch.Tensor:
    bounds = checked_offsets("varlen_attention", cu_seqlens, len(q), q=q)
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    offsets = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=window)
    assert isinstance(out, torch.Tensor), "only the output was asked for"
    return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> torch.Tensor:
    """Attend within documents of equal length, [N, L, A, D] -> [N L, A, D]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)
