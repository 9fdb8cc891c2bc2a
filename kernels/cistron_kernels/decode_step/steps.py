"""Triton functions of single steps: a Hyena layer between its two projections is one launch, its state moves in place.

A program takes a block of channels through several rows of the batch, so that filters are read once for them all.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _slot(end_ptr, end_stride, end, row, slots, IN_MEMORY: tl.constexpr):
    """Return the slot of this token in a ring; a negative one counts from its end, as in the reference."""
    if IN_MEMORY:
        end = tl.load(end_ptr + row * end_stride)
    return (end.to(tl.int64) % slots + slots) % slots  # The remainder has the sign of `end`.


@triton.jit
def _short_filter(x_ptr, taps_ptr, ring_ptr, column, inside, slot, slots, slot_stride, TAPS: tl.constexpr):
    """Filter the columns of one token by TAPS taps of their own, and write the token into its ring."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(ring_ptr.dtype.element_ty)
    tl.store(ring_ptr + slot * slot_stride + column, x, mask=inside)
    taps_ptr += column * TAPS + (TAPS - 1)
    y = x.to(tl.float32) * tl.load(taps_ptr, mask=inside, other=0.0).to(tl.float32)
    for lag in tl.static_range(1, TAPS):
        past = ring_ptr + (slot + slots - lag) % slots * slot_stride + column
        tap = tl.load(taps_ptr - lag, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(past, mask=inside, other=0.0).to(tl.float32) * tap
    return y


@triton.jit
def _gates(x_ptr, taps_ptr, ring_ptr, channel, inside, slot, slots, slot_stride, TAPS: tl.constexpr):
    """Return the gate behind the operator and the operator's input for a block of channels."""
    post_gate = _short_filter(x_ptr, taps_ptr, ring_ptr, 3 * channel, inside, slot, slots, slot_stride, TAPS)
    pre_gate = _short_filter(x_ptr, taps_ptr, ring_ptr, 3 * channel + 1, inside, slot, slots, slot_stride, TAPS)
    value = _short_filter(x_ptr, taps_ptr, ring_ptr, 3 * channel + 2, inside, slot, slots, slot_stride, TAPS)
    return post_gate, pre_gate * value


@triton.jit(do_not_specialize=["first_end", "end"])
def fir_kernel(
    x_ptr, first_taps_ptr, taps_ptr, skip_ptr, first_ring_ptr, ring_ptr, first_end_ptr, end_ptr, y_ptr,
    batch, channels, taps_group, skip_group, rows,
    x_row, first_slots, first_row, first_slot_stride, first_end_stride, first_end,
    slots, ring_row, slot_stride, end_stride, end,
    GATED: tl.constexpr, IMPULSE: tl.constexpr, HAS_SKIP: tl.constexpr, FIRST_END: tl.constexpr, END: tl.constexpr,
    FIRST_TAPS: tl.constexpr, TAPS: tl.constexpr, LAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Filter BLOCK channels of one token of `rows` rows; where GATED, between gates and behind the first filter."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    lag = tl.arange(0, LAGS)
    past = (lag > 0)[:, None] & (lag < TAPS)[:, None] & inside[None, :]
    tap_at = taps_ptr + (channel // taps_group)[None, :] * TAPS
    tap_at += lag[:, None] if IMPULSE else TAPS - 1 - lag[:, None]
    taps = tl.load(tap_at, mask=past, other=0.0).to(tl.float32)
    now_at = taps_ptr + channel // taps_group * TAPS + (0 if IMPULSE else TAPS - 1)
    now = tl.load(now_at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        now += tl.load(skip_ptr + channel // skip_group, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(1) * rows
    for i in range(0, tl.minimum(rows, batch - first)):
        row = first.to(tl.int64) + i
        slot = _slot(end_ptr, end_stride, end, row, slots, END)
        at = ring_ptr + row * ring_row + ((slot + slots - lag) % slots)[:, None] * slot_stride + channel[None, :]
        y = tl.sum(tl.load(at, mask=past, other=0.0).to(tl.float32) * taps, axis=0)
        if GATED:
            first_slot = _slot(first_end_ptr, first_end_stride, first_end, row, first_slots, FIRST_END)
            gate, x = _gates(
                x_ptr + row * x_row, first_taps_ptr, first_ring_ptr + row * first_row, channel, inside,
                first_slot, first_slots, first_slot_stride, FIRST_TAPS,
            )  # fmt: skip
        else:
            x = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0)
        x = x.to(ring_ptr.dtype.element_ty)
        tl.store(ring_ptr + row * ring_row + slot * slot_stride + channel, x, mask=inside)
        y += x.to(tl.float32) * now
        if GATED:
            y *= gate
        tl.store(y_ptr + row * channels + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 to fp32 precision: by its series near 0, where the difference would cancel."""
    series = 1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0) * (1.0 + x * 0.125))
    series = 1.0 + x * 0.25 * (1.0 + x * 0.2 * series)
    series = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit(do_not_specialize=["first_end"])
def modal_kernel(
    x_ptr, first_taps_ptr, log_poles_ptr, residues_ptr, skip_ptr, first_ring_ptr, state_ptr, first_end_ptr, y_ptr,
    batch, channels, poles, rows,
    x_row, first_slots, first_row, first_slot_stride, first_end_stride, first_end, state_row,
    GATED: tl.constexpr, FIRST_END: tl.constexpr, FIRST_TAPS: tl.constexpr, POLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance the states of BLOCK channels of `rows` rows by one token; GATED as in `fir_kernel`, and with the skip."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pole = tl.arange(0, POLES)
    inside = channel < channels
    known = inside[:, None] & (pole < poles)[None, :]
    at = channel[:, None] * poles + pole[None, :]
    change = _expm1(tl.load(log_poles_ptr + at, mask=known, other=0.0).to(tl.float32))
    residues = tl.load(residues_ptr + at, mask=known, other=0.0).to(tl.float32)
    first = tl.program_id(1) * rows
    for i in range(0, tl.minimum(rows, batch - first)):
        row = first.to(tl.int64) + i
        state_at = state_ptr + row * state_row + at
        state = tl.load(state_at, mask=known, other=0.0).to(tl.float32)
        if GATED:
            slot = _slot(first_end_ptr, first_end_stride, first_end, row, first_slots, FIRST_END)
            gate, x = _gates(
                x_ptr + row * x_row, first_taps_ptr, first_ring_ptr + row * first_row, channel, inside,
                slot, first_slots, first_slot_stride, FIRST_TAPS,
            )  # fmt: skip
        else:
            x = tl.load(x_ptr + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
        state += change * state + x[:, None]
        tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=known)
        y = tl.sum(state * residues, axis=1)
        if GATED:
            y = gate * (y + x * tl.load(skip_ptr + channel, mask=inside, other=0.0).to(tl.float32))
        tl.store(y_ptr + row * channels + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
