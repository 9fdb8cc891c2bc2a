"""Triton kernels of the gated linear unit: elementwise, one pass forward, and one backward that computes again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import on_device, plane, plane_tile


@triton.jit
def gelu_and_slope(x):
    """Return x Phi(x) and its derivative, Phi the normal distribution."""
    distribution = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * distribution, distribution + x * density


@triton.jit
def forward_kernel(
    gate_ptr, value_ptr, y_ptr, rows, columns, gate_stride, value_stride,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply one tile of gate and value [rows, columns], whose rows are `*_stride` apart."""
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GELU:
        gate, _ = gelu_and_slope(gate)
    y = (gate * value).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y, mask=inside)


@triton.jit
def backward_kernel(
    gate_ptr, value_ptr, grad_ptr, grad_gate_ptr, grad_value_ptr, rows, columns, gate_stride, value_stride,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradients of gate and value."""
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_gate = grad * value
    if GELU:
        gate, slope = gelu_and_slope(gate)
        grad_gate *= slope
    tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_value_ptr + at, (grad * gate).to(grad_value_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("cistron::glu", mutates_args=())
def glu(gate: Tensor, value: Tensor, gelu: bool) -> Tensor:
    """Return gate [..., F], or its GELU, times value; arguments are checked by the package's function of this name."""
    y = gate.new_empty(gate.shape)
    _launch(forward_kernel, plane(gate), plane(value), (y,), gelu)
    return y


@torch.library.custom_op("cistron::glu_backward", mutates_args=())
def glu_backward(gate: Tensor, value: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and value."""
    grad_gate, grad_value = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(backward_kernel, plane(gate), plane(value), (grad.contiguous(), grad_gate, grad_value), gelu)
    return grad_gate, grad_value


def _launch(kernel, gate: Tensor, value: Tensor, contiguous: tuple[Tensor, ...], gelu: bool) -> None:
    (rows, columns), tile = gate.shape, plane_tile(gate.shape[1], per_thread=16)
    if rows:
        with on_device(gate):
            kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]),)](
                gate, value, *contiguous, rows, columns, gate.stride(0), value.stride(0), GELU=gelu, **tile
            )


@glu.register_fake
def _(gate: Tensor, value: Tensor, gelu: bool) -> Tensor:
    return gate.new_empty(gate.shape)


@glu_backward.register_fake
def _(gate: Tensor, value: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _keep(ctx, inputs, output):
    gate, value, ctx.gelu = inputs
    ctx.save_for_backward(gate, value)


def _gradient(ctx, grad):
    return *glu_backward(*ctx.saved_tensors, grad, ctx.gelu), None


glu.register_autograd(_gradient, setup_context=_keep)
