"""Attention over packed documents."""

from __future__ import annotations

import torch

from cistron_kernels.checks import INDEX_DTYPES, can_look_at, check_floating, check_same_device, checked_offsets, refuse
from cistron_kernels.dispatch import decision, takes_triton
from cistron_kernels.varlen_attention import reference

__all__ = ["varlen_attention"]

LARGEST_HEAD, LARGEST_WIDE_HEAD = 256, 128
"""Of the Triton kernels in half precision and in fp32: their programs hold whole heads in registers."""


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, causal: bool, scale: float
) -> torch.Tensor:
    """Run softmax attention inside each document of a packed batch.

    On a GPU, torch's own kernel for packed documents runs where it applies (half precision), Triton's elsewhere and
    where an override names this op.

    Args:
        q: [T, A, D] queries.
        k: [T, A, D] keys.
        v: [T, A, D] values.
        cu_seqlens: [N+1] int offsets of the documents, from 0 to T. Offsets in host memory spare a device
            synchronisation, and are checked.
        causal: a token attends to itself and to what precedes it; otherwise to its whole document.
        scale: factor of the scores before the softmax.

    Returns:
        [T, A, D].

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the offsets do not run from 0 to T without decreasing.
    """
    _check(q, k, v, cu_seqlens)
    largest = LARGEST_WIDE_HEAD if q.dtype == torch.float32 else LARGEST_HEAD
    packed = reference.has_packed_kernel(q) and not decision("varlen_attention").by_name
    if q.shape[-1] <= largest and takes_triton("varlen_attention", q, k, v) and not packed:
        from cistron_kernels.varlen_attention import kernel

        return kernel.varlen_attention(q, k, v, cu_seqlens, causal, scale)[0]
    return reference.varlen_attention(q, k, v, cu_seqlens, causal=causal, scale=scale)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    op, tensors = "varlen_attention", {"q": q, "k": k, "v": v}
    if q.dim() != 3 or not q.shape[1] * q.shape[2] or k.shape != q.shape or v.shape != q.shape:
        refuse(op, "q, k and v must be [T, A, D] with at least one head", **tensors)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        refuse(op, "q, k and v must have one dtype", **tensors)
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in INDEX_DTYPES:
        refuse(op, "cu_seqlens must be [N+1] int32 or int64", cu_seqlens=cu_seqlens, **tensors)
    if can_look_at(cu_seqlens):
        checked_offsets(op, cu_seqlens, len(q), **tensors)
