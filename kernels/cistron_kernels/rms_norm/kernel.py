"""Triton kernels of root-mean-square normalisation: one pass over memory forward, one backward.

Nothing but the input is kept for the gradient: whoever reads a row again has its statistics for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import looping_programs, on_device, prefetch_stages, row_tile


@triton.jit
def _scale_and_slope(x, columns, eps, EPS_INSIDE: tl.constexpr):
    """Return s of each row of x [R, C], and t such that ds/dx = -t x / columns."""
    mean_square = tl.sum(x * x, axis=1) / columns
    if EPS_INSIDE:
        scale = 1.0 / tl.sqrt(mean_square + eps)
        slope = scale * scale * scale
    else:
        root = tl.sqrt(mean_square)
        scale = 1.0 / (root + eps)
        slope = tl.where(root > 0, scale * scale / tl.where(root > 0, root, 1.0), 0.0)
    return scale, slope


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rows, columns, eps,
    EPS_INSIDE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
    scale, _ = _scale_and_slope(x, columns, eps, EPS_INSIDE)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, grad_y_ptr, grad_total_ptr, grad_x_ptr, narrow_ptr, partial_ptr, rows, columns, eps,
    EPS_INSIDE: tl.constexpr, ADD: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, and each program's share of that of the weight to partial [programs, columns].

    Where NARROW, the gradient is written a second time in the dtype of another tensor.
    """
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    share = tl.zeros((COLUMNS,), dtype=tl.float32)
    # The stages fetch the next rows while these are reduced.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale, slope = _scale_and_slope(x, columns, eps, EPS_INSIDE)
        share += tl.sum(grad * x * scale[:, None], axis=0)
        grad *= weight[None, :]
        along = tl.sum(grad * x, axis=1) / columns
        grad = grad * scale[:, None] - x * (slope * along)[:, None]
        if ADD:
            grad += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NARROW:
            tl.store(narrow_ptr + at, grad.to(narrow_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0) * columns + column, share, mask=column < columns)


@torch.library.custom_op("cistron::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, eps_inside: bool, dtype: torch.dtype) -> Tensor:
    """Return the normalised x [..., H]; arguments are checked by the package's function of this name."""
    return _forward(x, None, weight, eps, eps_inside, dtype)[0]


@torch.library.custom_op("cistron::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, eps_inside: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the normalised x + residual, and that sum."""
    return _forward(x, residual, weight, eps, eps_inside, dtype)


@torch.library.custom_op("cistron::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x: Tensor, weight: Tensor, grad_y: Tensor, grad_total: Tensor | None, eps: float, eps_inside: bool,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x (the sum, where there is one) and of the weight.

    The last is the first in the dtype `narrow`; without elements where that is the dtype of x.
    """
    x, weight, grad_y = x.contiguous(), weight.contiguous(), grad_y.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    columns, tile = x.shape[-1], row_tile(x.shape[-1], per_thread=16)
    rows = x.numel() // max(columns, 1)
    programs = looping_programs(x, triton.cdiv(rows, tile["ROWS"]), num_warps=tile["num_warps"])
    grad_x = torch.empty_like(x)
    narrowed = torch.empty_like(x if narrow != x.dtype else x[:0], dtype=narrow)
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    element_bytes = x.itemsize + grad_y.itemsize + (0 if grad_total is None else grad_total.itemsize)
    stages = prefetch_stages(tile["ROWS"] * tile["COLUMNS"] * element_bytes)
    with on_device(x):
        backward_kernel[(programs,)](
            x, weight, grad_y, x if grad_total is None else grad_total, grad_x, narrowed, partial, rows, columns, eps,
            EPS_INSIDE=eps_inside, ADD=grad_total is not None, NARROW=narrow != x.dtype, STAGES=stages, **tile,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype), narrowed


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, eps_inside: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    added = x if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    total = y if residual is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    columns, tile = x.shape[-1], row_tile(x.shape[-1], per_thread=32)
    if rows := x.numel() // max(columns, 1):
        with on_device(x):
            forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                x, added, weight, y, total, rows, columns, eps,
                EPS_INSIDE=eps_inside, ADD=residual is not None, **tile,
            )  # fmt: skip
    return y, total


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, eps_inside: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, eps_inside: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y, dtype=torch.promote_types(x.dtype, residual.dtype))


@rms_norm_backward.register_fake
def _(
    x: Tensor, weight: Tensor, grad_y: Tensor, grad_total: Tensor | None, eps: float, eps_inside: bool,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), torch.empty_like(x if narrow != x.dtype else x[:0], dtype=narrow)


def _keep(ctx, inputs, output):
    *tensors, weight, eps, eps_inside, _ = inputs
    ctx.save_for_backward(output[1] if len(tensors) == 2 else tensors[0], weight)
    ctx.eps, ctx.eps_inside, ctx.dtype = eps, eps_inside, tensors[0].dtype


def _rms_norm_gradient(ctx, grad_y):
    grad, grad_weight, _ = rms_norm_backward(*ctx.saved_tensors, grad_y, None, ctx.eps, ctx.eps_inside, ctx.dtype)
    return grad, grad_weight, None, None, None


def _add_rms_norm_gradient(ctx, grad_y, grad_total):
    options = ctx.eps, ctx.eps_inside, ctx.dtype
    grad, grad_weight, narrow = rms_norm_backward(*ctx.saved_tensors, grad_y, grad_total, *options)
    return grad if ctx.dtype == grad.dtype else narrow, grad, grad_weight, None, None, None


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_keep)
add_rms_norm.register_autograd(_add_rms_norm_gradient, setup_context=_keep)
