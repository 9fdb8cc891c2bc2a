"""The finite filters by Triton: launches, registered with PyTorch as one operation, gated or not, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cistron_kernels.hyena_fir import launching, reference
from cistron_kernels.hyena_fir.backward import backward_kernel
from cistron_kernels.hyena_fir.forward import forward_kernel
from cistron_kernels.hyena_fir.histories import last_gated_inputs
from cistron_kernels.hyena_fir.launching import PROJECTION_TAPS, constants, fits, inputs, plan
from cistron_kernels.hyena_fir.reference import TapOrder, per_channel
from cistron_kernels.launch import on_device
from cistron_kernels.rows import aligned, empty_rows, last_inputs

__all__ = ["fir", "fir_backward", "fits", "gated_fir", "hyena_fir"]


def hyena_fir(
    x: Tensor, taps: Tensor, order: TapOrder, skip: Tensor | None, history: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do what the package's function of this name does, which has checked the arguments."""
    if skip is not None:
        skip = per_channel(skip, x.shape[1])
    y = fir(x, None, taps, skip, None, history, order == "impulse")
    return y, last_inputs(x, history, lengths, taps.shape[1] - 1)


def gated_fir(
    projected: Tensor,
    projection_taps: Tensor,
    taps: Tensor,
    order: TapOrder,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what the package's function of this name does, which has checked the arguments."""
    batch, rows, _ = projected.shape
    width = taps.shape[1]
    missing = PROJECTION_TAPS - projection_taps.shape[1]
    padded_taps, padded_history = functional.pad(projection_taps, (missing, 0)), projection_history
    if projection_history is not None:
        padded_history = functional.pad(projection_history, (missing, 0))
    elif history is not None:
        padded_history = projected.new_zeros(batch, rows, PROJECTION_TAPS - 1)
    past = history
    if history is None and projection_history is not None:
        past = projected.new_zeros(batch, rows // 3, width - 1)
    if skip is not None:
        skip = per_channel(skip, rows // 3)
    y = fir(projected, padded_taps, taps, skip, padded_history, past, order == "impulse")
    last_projected = last_inputs(projected, projection_history, lengths, projection_taps.shape[1] - 1)
    last = last_gated_inputs(projected, projection_taps, projection_history, history, lengths, width - 1)
    return y, last_projected, last


@torch.library.custom_op("cistron::hyena_fir", mutates_args=())
def fir(
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
    impulse: bool,
) -> Tensor:
    """Return y [B, C, L], stored channel by channel, rows of one channel side by side.

    Args:
        x: [B, C, L], or [B, 3C, L] where there are projection taps.
        projection_taps: [3C, 3], or none: no filter before, and no gates.
        taps: [G, K].
        skip: [C].
        projection_history: [B, 3C, 2], given with `history` or not at all.
        history: [B, C, K-1].
        impulse: whether the current token's tap is the first.
    """
    length, x = x.shape[2], aligned(x)
    channels, width = x.shape[1] // (1 if projection_taps is None else 3), taps.shape[1]
    y = empty_rows(x, channels)
    grid, share = plan(x, channels, taps.shape[0], launching.FORWARD_ROWS, launching.FORWARD_WAVES)
    with on_device(x):
        forward_kernel[grid](
            *inputs(x, projection_taps, taps, skip, projection_history, history), y, x.stride(0), x.stride(1),
            y.stride(0), y.stride(1), x.shape[2], taps.shape[0], channels // taps.shape[0], width, **share,
            **constants(x, projection_taps, skip, history, impulse, width),
        )  # fmt: skip
    return y[..., :length]


@torch.library.custom_op("cistron::hyena_fir_backward", mutates_args=())
def fir_backward(
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
    grad_y: Tensor,
    impulse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, projection taps, taps and skip, empty where there is no such tensor."""
    length, x, grad_y = x.shape[2], aligned(x), aligned(grad_y)
    (batch, rows, _), (groups, width), channels = x.shape, taps.shape, grad_y.shape[1]
    grad_x = empty_rows(x, rows)
    grid, share = plan(x, channels, groups, launching.BACKWARD_ROWS, launching.BACKWARD_WAVES)
    shares = batch * share["stretches"]
    projection_partial = x.new_empty(
        0 if projection_taps is None else shares, rows, PROJECTION_TAPS, dtype=torch.float32
    )
    partial = x.new_empty(shares, groups, grid[0] // (share["stretches"] * groups), width, dtype=torch.float32)
    skip_partial = x.new_empty(0 if skip is None else shares, channels, dtype=torch.float32)
    with on_device(x):
        backward_kernel[grid](
            *inputs(x, projection_taps, taps, skip, projection_history, history), grad_y,
            grad_x, projection_partial, partial, skip_partial, x.stride(0), x.stride(1), grad_y.stride(0),
            grad_y.stride(1), grad_x.stride(0), grad_x.stride(1), x.shape[2], groups, channels // groups, width,
            **share, **constants(x, projection_taps, skip, history, impulse, width),
        )  # fmt: skip
    grad_projection_taps = x.new_empty(0) if projection_taps is None else projection_partial.sum(0)
    grad_skip = x.new_empty(0) if skip is None else skip_partial.sum(0)
    return (
        grad_x[..., :length],
        grad_projection_taps.to(x.dtype if projection_taps is None else projection_taps.dtype),
        partial.sum((0, 2)).to(taps.dtype),
        grad_skip.to(x.dtype if skip is None else skip.dtype),
    )


@fir.register_fake
def _(
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
    impulse: bool,
) -> Tensor:
    return empty_rows(x, x.shape[1] // (1 if projection_taps is None else 3))[..., : x.shape[2]]


@fir_backward.register_fake
def _(
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
    grad_y: Tensor,
    impulse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_rows(x, x.shape[1])[..., : x.shape[2]],
        x.new_empty(0) if projection_taps is None else projection_taps.new_empty(projection_taps.shape),
        taps.new_empty(taps.shape),
        x.new_empty(0) if skip is None else skip.new_empty(skip.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.impulse = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_x, grad_projection_taps, grad_taps, grad_skip = fir_backward(*tensors, grad_y, ctx.impulse)
    grad_histories: tuple[Tensor | None, Tensor | None] = (None, None)
    if any(ctx.needs_input_grad[4:6]):
        grad_histories = _history_gradients(grad_y, "impulse" if ctx.impulse else "correlation", *tensors)
    _, projection_taps, _, skip, _, _ = tensors
    return (
        grad_x,
        None if projection_taps is None else grad_projection_taps,
        grad_taps,
        None if skip is None else grad_skip,
        *grad_histories,
        None,
    )


def _history_gradients(
    grad_y: Tensor,
    order: TapOrder,
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the histories, by way of the reference: they reach the first few outputs only."""
    head = slice(taps.shape[1] + PROJECTION_TAPS)
    x, grad_y, past = x[..., head], grad_y[..., head], history.detach().requires_grad_()
    with torch.enable_grad():
        if projection_taps is None or projection_history is None:
            y, _ = reference.hyena_fir(x, taps, order=order, skip=skip, history=past)
            return None, torch.autograd.grad(y, past, grad_y)[0]
        rows = projection_history.detach().requires_grad_()
        y, *_ = reference.gated_fir(
            x, projection_taps, taps, order=order, skip=skip, projection_history=rows, history=past
        )  # fmt: skip
        first, second = torch.autograd.grad(y, (rows, past), grad_y)
    return first, second


fir.register_autograd(_gradient, setup_context=_keep)
