"""Operators of attention over packed documents, and their launches: a tile never spans two documents."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from cistron_kernels.checks import checked_offsets
from cistron_kernels.launch import on_device, operand_dtype
from cistron_kernels.varlen_attention.flash import (
    delta_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

FORWARD_HALF = {
    64: {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 2},
    128: {"QUERIES": 64, "KEYS": 64, "num_warps": 8, "num_stages": 2},
    256: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
}
FORWARD_WIDE = {
    64: {"QUERIES": 64, "KEYS": 32, "num_warps": 8, "num_stages": 2},
    128: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
}
BACKWARD_HALF = {
    64: {"QUERIES": 64, "KEYS": 64, "num_warps": 8, "num_stages": 1},
    128: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    256: {"QUERIES": 16, "KEYS": 32, "num_warps": 8, "num_stages": 1},
}
BACKWARD_WIDE = {
    64: {"QUERIES": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    128: {"QUERIES": 16, "KEYS": 16, "num_warps": 4, "num_stages": 1},
}
"""Tiles by the padded size of a head, for half precision and for fp32: what fits shared memory and registers."""

_INTERPRETED = {"QUERIES": 16, "KEYS": 16}
"""Tiles under the interpreter: small, so that tests of few tokens meet several."""


@torch.library.custom_op("cistron::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the outputs [T, A, D], and log2 of the softmax's sums [A, T], in fp32."""
    q, k, v = (_channels_last(tensor) for tensor in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, _ = q.shape
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    blocks, options = _blocks(q, FORWARD_HALF, FORWARD_WIDE), _constants(q, causal)
    if q.numel():
        tiles = tile_map(cu_seqlens, tokens, blocks["QUERIES"], q.device)
        with on_device(q):
            forward_kernel[(len(tiles), heads)](
                q, k, v, out, lse, tiles, tokens, scale / math.log(2),
                *_strides(q, k, v), out.stride(0), **options, **blocks,
            )  # fmt: skip
    return out, lse


@torch.library.custom_op("cistron::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    q, k, v, grad = (_channels_last(tensor) for tensor in (q, k, v, grad))
    tokens, heads, size = q.shape
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel():
        return grad_q, grad_k, grad_v
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    blocks, options = _blocks(q, BACKWARD_HALF, BACKWARD_WIDE), _constants(q, causal)
    queries, keys = (tile_map(cu_seqlens, len(q), blocks[name], q.device) for name in ("QUERIES", "KEYS"))
    tail = (tokens, scale / math.log(2), scale, *_strides(q, k, v, grad), out.stride(0))
    rows = 32
    with on_device(q):
        delta_kernel[(triton.cdiv(tokens, rows), heads)](
            out, grad, delta, tokens, *_strides(grad), out.stride(0),
            HEAD=size, WIDTH=options["WIDTH"], TOKENS=rows,
        )  # fmt: skip
        query_gradient_kernel[(len(queries), heads)](
            q, k, v, grad, lse, delta, grad_q, queries, *tail, **options, **blocks
        )
        key_gradient_kernel[(len(keys), heads)](
            q, k, v, grad, lse, delta, grad_k, grad_v, keys, *tail, **options, **blocks
        )
    return grad_q, grad_k, grad_v


def tile_map(cu_seqlens: Tensor, tokens: int, size: int, device: torch.device) -> Tensor:
    """Return, for each tile of at most `size` tokens of one document, its first token and the document's begin and end.

    Made in host memory: offsets that stand on the device are waited for.

    Raises:
        ValueError: the offsets do not run from 0 to `tokens` without decreasing.
    """
    offsets = torch.tensor(checked_offsets("varlen_attention", cu_seqlens, tokens))
    begins, ends = offsets[:-1], offsets[1:]
    counts = (ends - begins + size - 1) // size
    document = torch.repeat_interleave(counts)
    firsts = begins[document] + size * (torch.arange(len(document)) - (counts.cumsum(0) - counts)[document])
    return torch.stack([firsts, begins[document], ends[document]], dim=1).to(device, torch.int32, non_blocking=True)


def _blocks(q: Tensor, half: dict[int, dict[str, int]], wide: dict[int, dict[str, int]]) -> dict[str, int]:
    """Return the tile of one kernel."""
    if not q.is_cuda:
        return _INTERPRETED
    return (wide if q.dtype == torch.float32 else half)[max(64, triton.next_power_of_2(q.shape[-1]))]


def _constants(q: Tensor, causal: bool) -> dict[str, Any]:
    """Return what all products share. Operands in fp32 are multiplied in three parts of tf32, which lose nothing."""
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    precision = "tf32x3" if q.is_cuda and q.dtype == torch.float32 else "ieee"
    return {"CAUSAL": causal, "HEAD": q.shape[-1], "WIDTH": width, "OPERAND": operand_dtype(q), "PRECISION": precision}


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


@varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@varlen_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _gradient(ctx, grad, _):
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = varlen_attention_backward(*tensors, grad, cu_seqlens, ctx.causal, ctx.scale)
    return *grads, None, None, None


varlen_attention.register_autograd(_gradient, setup_context=_keep)
