"""Triton kernels of bias and GELU: elementwise forward; the backward computes again and sums the bias' gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.glu.kernel import gelu_and_slope
from cistron_kernels.launch import looping_programs, on_device, plane, plane_tile, prefetch_stages


@triton.jit
def forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows, columns, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write one tile of y [rows, columns]; the rows of x are `x_stride` apart."""
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y, _ = gelu_and_slope(x + bias[None, :])
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr, bias_ptr, grad_y_ptr, grad_x_ptr, partial_ptr, rows, columns, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x in one block of columns, and its sums over a program's rows to partial [.., columns]."""
    tiles = tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    share = tl.zeros((COLUMNS,), dtype=tl.float32)
    # The stages fetch the next rows while these are worked on.
    for tile in tl.range(first, tl.cdiv(rows, ROWS), tl.num_programs(0) // tiles, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        _, slope = gelu_and_slope(x + bias[None, :])
        grad *= slope
        share += tl.sum(grad, axis=0)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + first * columns + column, share, mask=column < columns)


@torch.library.custom_op("cistron::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return the GELU of x [..., F] plus bias; arguments are checked by the package's function of this name."""
    y = x.new_empty(x.shape)
    x, bias = plane(x), bias.contiguous()
    (rows, columns), tile = x.shape, plane_tile(x.shape[1], per_thread=16)
    if rows:
        with on_device(x):
            forward_kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]),)](
                x, bias, y, rows, columns, x.stride(0), **tile
            )
    return y


@torch.library.custom_op("cistron::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(x: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the bias."""
    grad_x = x.new_empty(x.shape)
    x, bias, grad_y = plane(x), bias.contiguous(), grad_y.contiguous()
    (rows, columns), tile = x.shape, plane_tile(x.shape[1], per_thread=16)
    blocks = max(1, triton.cdiv(columns, tile["COLUMNS"]))
    tiles = blocks * triton.cdiv(rows, tile["ROWS"])
    programs = max(1, looping_programs(x, tiles, num_warps=tile["num_warps"]) // blocks)
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    stages = prefetch_stages(tile["ROWS"] * tile["COLUMNS"] * (x.itemsize + grad_y.itemsize))
    with on_device(x):
        backward_kernel[(programs * blocks,)](
            x, bias, grad_y, grad_x, partial, rows, columns, x.stride(0), STAGES=stages, **tile
        )
    return grad_x, partial.sum(0).to(bias.dtype)


@bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@bias_gelu_backward.register_fake
def _(x: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(bias)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad_y):
    return bias_gelu_backward(*ctx.saved_tensors, grad_y)


bias_gelu.register_autograd(_gradient, setup_context=_keep)
