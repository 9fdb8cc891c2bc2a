"""Operators of single steps, and how their kernels are launched: all of a layer's step in one launch, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cistron_kernels.decode_step.steps import fir_kernel, modal_kernel
from cistron_kernels.launch import num_multiprocessors, on_device

PROGRAMS = 4
"""Per multiprocessor: enough to keep its memory busy; with more rows than that, a program takes several."""


class Ring(NamedTuple):
    """A history [B, N, C] and the slot of this token in it: in a tensor [1] or [B] or, without one, as a number."""

    history: Tensor
    end: Tensor | None
    slot: int

    def numbers(self) -> tuple[int, ...]:
        """Return slots, strides of rows and slots, stride of `end`, and the number of the slot."""
        end_stride = 0 if self.end is None or len(self.end) == 1 else self.end.stride(0)
        return (self.history.shape[1], *self.history.stride()[:2], end_stride, self.slot)


class Projection(NamedTuple):
    """The short filter before the gates: its taps [3D, K] and its ring."""

    taps: Tensor
    ring: Ring


@torch.library.custom_op("cistron::fir_step", mutates_args=("history",))
def fir_step(
    x: Tensor, taps: Tensor, history: Tensor, end: Tensor | None, slot: int, impulse: bool, skip: Tensor | None
) -> Tensor:
    """Filter one token [B, C], and write it into the history [B, N, C]."""
    return _fir(x, None, taps, Ring(history, end, slot), impulse, skip)


@torch.library.custom_op("cistron::gated_fir_step", mutates_args=("projection_history", "history"))
def gated_fir_step(
    projected: Tensor,
    projection_taps: Tensor,
    taps: Tensor,
    projection_history: Tensor,
    history: Tensor,
    projection_end: Tensor | None,
    projection_slot: int,
    end: Tensor | None,
    slot: int,
    impulse: bool,
    skip: Tensor | None,
) -> Tensor:
    """Run one token of an HCS or HCM layer between its projections, [B, 3D] -> [B, D]."""
    projection = Projection(projection_taps, Ring(projection_history, projection_end, projection_slot))
    return _fir(projected, projection, taps, Ring(history, end, slot), impulse, skip)


@torch.library.custom_op("cistron::modal_step", mutates_args=("state",))
def modal_step(x: Tensor, log_poles: Tensor, residues: Tensor, state: Tensor) -> Tensor:
    """Advance the modal state [B, H, S] by one token [B, H]."""
    return _modal(x, None, log_poles, residues, None, state)


@torch.library.custom_op("cistron::gated_modal_step", mutates_args=("projection_history", "state"))
def gated_modal_step(
    projected: Tensor,
    projection_taps: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor,
    projection_history: Tensor,
    state: Tensor,
    projection_end: Tensor | None,
    projection_slot: int,
) -> Tensor:
    """Run one token of an HCL layer between its projections, [B, 3D] -> [B, D]."""
    projection = Projection(projection_taps, Ring(projection_history, projection_end, projection_slot))
    return _modal(projected, projection, log_poles, residues, skip, state)


def _fir(
    x: Tensor, projection: Projection | None, taps: Tensor, ring: Ring, impulse: bool, skip: Tensor | None
) -> Tensor:
    """Launch `fir_kernel`."""
    x, taps, first = _rows(x), taps.contiguous(), _first(projection, taps, ring)
    batch, channels, width = len(x), ring.history.shape[2], taps.shape[1]
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    grid, rows, block = _grid(x, channels, most=128 if width <= 16 else 64)
    skipped = taps if skip is None else skip.contiguous()
    if y.numel():
        with on_device(x):
            fir_kernel[grid](
                x, first.taps, taps, skipped, first.ring.history, ring.history, _pointer(first.ring.end, x),
                _pointer(ring.end, x), y, batch, channels, channels // len(taps), channels // len(skipped), rows,
                x.stride(0), *first.ring.numbers(), *ring.numbers(),
                GATED=projection is not None, IMPULSE=impulse, HAS_SKIP=skip is not None,
                FIRST_END=first.ring.end is not None, END=ring.end is not None,
                FIRST_TAPS=first.taps.shape[1], TAPS=width, LAGS=triton.next_power_of_2(width), BLOCK=block,
            )  # fmt: skip
    return y


def _modal(
    x: Tensor, projection: Projection | None, log_poles: Tensor, residues: Tensor, skip: Tensor | None, state: Tensor
) -> Tensor:
    """Launch `modal_kernel`."""
    x, first = _rows(x), _first(projection, log_poles, Ring(state, None, 0))
    batch, (channels, poles) = len(x), log_poles.shape
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    grid, rows, block = _grid(x, channels, most=64)
    if y.numel():
        with on_device(x):
            modal_kernel[grid](
                x, first.taps, log_poles.contiguous(), residues.contiguous(), x if skip is None else skip.contiguous(),
                first.ring.history, state, _pointer(first.ring.end, x), y, batch, channels, poles, rows,
                x.stride(0), *first.ring.numbers(), state.stride(0),
                GATED=projection is not None, FIRST_END=first.ring.end is not None,
                FIRST_TAPS=first.taps.shape[1], POLES=triton.next_power_of_2(poles), BLOCK=block,
            )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _first(projection: Projection | None, taps: Tensor, ring: Ring) -> Projection:
    """Return the projection's filter; without one, what the kernel gets in its place and does not touch."""
    if projection is None:
        return Projection(taps, Ring(ring.history, None, 0))
    return Projection(projection.taps.contiguous(), projection.ring)


def _pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _grid(x: Tensor, channels: int, *, most: int) -> tuple[tuple[int, int], int, int]:
    """Return the grid, the rows of a program and its channels, at most `most`."""
    block = min(most, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    rows = triton.cdiv(len(x) * blocks, PROGRAMS * num_multiprocessors(x.device)) or 1
    return (blocks, triton.cdiv(len(x), rows)), rows, block


@fir_step.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@modal_step.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@gated_fir_step.register_fake
def _(projected: Tensor, *_: Any) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 3)


@gated_modal_step.register_fake
def _(projected: Tensor, *_: Any) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 3)
