"""Triton kernels of layer normalisation: one pass over memory forward, one backward.

Nothing but the input is kept for the gradient: whoever reads a row again has its statistics for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import looping_programs, on_device, prefetch_stages, row_tile


@triton.jit
def _standardised(x, inside, columns, eps):
    """Return (x - mean) / deviation of each row of x [R, C], zero outside, and 1 / deviation [R]."""
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / columns)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / columns + eps)
    return centred * scale[:, None], scale


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, rows, columns, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows of x [rows, columns], after adding the residual where ADD."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    standard, _ = _standardised(x, inside, columns, eps)
    y = standard * weight[None, :] + bias[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, grad_y_ptr, grad_total_ptr, grad_x_ptr, narrow_ptr, partial_ptr, rows, columns, eps,
    ADD: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, and each program's share of those of weight and bias to partial [programs, 2, columns].

    Where NARROW, the gradient is written a second time in the dtype of another tensor.
    """
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    weight_share = tl.zeros((COLUMNS,), dtype=tl.float32)
    bias_share = tl.zeros((COLUMNS,), dtype=tl.float32)
    # The stages fetch the next rows while these are reduced.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        standard, scale = _standardised(x, inside, columns, eps)
        weight_share += tl.sum(grad * standard, axis=0)
        bias_share += tl.sum(grad, axis=0)
        grad *= weight[None, :]
        along = tl.sum(grad * standard, axis=1) / columns
        grad = (grad - (tl.sum(grad, axis=1) / columns)[:, None] - standard * along[:, None]) * scale[:, None]
        if ADD:
            grad += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NARROW:
            tl.store(narrow_ptr + at, grad.to(narrow_ptr.dtype.element_ty), mask=inside)
    partial_ptr += 2 * tl.program_id(0) * columns
    tl.store(partial_ptr + column, weight_share, mask=column < columns)
    tl.store(partial_ptr + columns + column, bias_share, mask=column < columns)


@torch.library.custom_op("cistron::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the normalised x [..., H]; arguments are checked by the package's function of this name."""
    return _forward(x, None, weight, bias, eps, dtype)[0]


@torch.library.custom_op("cistron::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the normalised x + residual, and that sum."""
    return _forward(x, residual, weight, bias, eps, dtype)


@torch.library.custom_op("cistron::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    x: Tensor, weight: Tensor, grad_y: Tensor, grad_total: Tensor | None, eps: float, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (the sum, where there is one), weight and bias.

    The last is the first in the dtype `narrow`; without elements where that is the dtype of x.
    """
    x, weight, grad_y = x.contiguous(), weight.contiguous(), grad_y.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    columns, tile = x.shape[-1], row_tile(x.shape[-1], per_thread=16)
    rows = x.numel() // max(columns, 1)
    programs = looping_programs(x, triton.cdiv(rows, tile["ROWS"]), num_warps=tile["num_warps"])
    grad_x = torch.empty_like(x)
    narrowed = torch.empty_like(x if narrow != x.dtype else x[:0], dtype=narrow)
    partial = x.new_empty(programs, 2, columns, dtype=torch.float32)
    element_bytes = x.itemsize + grad_y.itemsize + (0 if grad_total is None else grad_total.itemsize)
    stages = prefetch_stages(tile["ROWS"] * tile["COLUMNS"] * element_bytes)
    with on_device(x):
        backward_kernel[(programs,)](
            x, weight, grad_y, x if grad_total is None else grad_total, grad_x, narrowed, partial, rows, columns, eps,
            ADD=grad_total is not None, NARROW=narrow != x.dtype, STAGES=stages, **tile,
        )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0).to(weight.dtype)
    return grad_x, grad_weight.clone(), grad_bias.clone(), narrowed


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    added = x if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    total = y if residual is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    columns, tile = x.shape[-1], row_tile(x.shape[-1], per_thread=32)
    if rows := x.numel() // max(columns, 1):
        with on_device(x):
            forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                x, added, weight, bias, y, total, rows, columns, eps, ADD=residual is not None, **tile
            )
    return y, total


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y, dtype=torch.promote_types(x.dtype, residual.dtype))


@layer_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, grad_y: Tensor, grad_total: Tensor | None, eps: float, narrow: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    narrowed = torch.empty_like(x if narrow != x.dtype else x[:0], dtype=narrow)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight), narrowed


def _keep(ctx, inputs, output):
    *tensors, weight, _, eps, _ = inputs
    ctx.save_for_backward(output[1] if len(tensors) == 2 else tensors[0], weight)
    ctx.eps, ctx.dtype = eps, tensors[0].dtype


def _layer_norm_gradient(ctx, grad_y):
    x, weight = ctx.saved_tensors
    grad, grad_weight, grad_bias, _ = layer_norm_backward(x, weight, grad_y, None, ctx.eps, ctx.dtype)
    return grad, grad_weight, grad_bias, None, None


def _add_layer_norm_gradient(ctx, grad_y, grad_total):
    total, weight = ctx.saved_tensors
    grad, grad_weight, grad_bias, narrow = layer_norm_backward(total, weight, grad_y, grad_total, ctx.eps, ctx.dtype)
    return grad if ctx.dtype == grad.dtype else narrow, grad, grad_weight, grad_bias, None, None


layer_norm.register_autograd(_layer_norm_gradient, setup_context=_keep)
add_layer_norm.register_autograd(_add_layer_norm_gradient, setup_context=_keep)
