"""Triton kernel of the finite filters, forward: one pass over memory."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from cistron_kernels.hyena_fir import tiles


@triton.jit
def forward_kernel(
    x_ptr, projection_history_ptr, projection_taps_ptr, history_ptr, taps_ptr, skip_ptr, y_ptr,
    x_batch, x_row, y_batch, y_row, length, groups, channels_per_group, width, steps, stretches,
    GATED: tl.constexpr, SKIP: tl.constexpr, HISTORY: tl.constexpr, IMPULSE: tl.constexpr, BLOCKS: tl.constexpr,
    STRETCHES: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Filter STRETCHES stretches of `steps` chunks, of CHANNELS channels that share a filter, chunk by chunk."""
    batch = tl.program_id(1).to(tl.int64)
    group, channel, real, start = tiles.place(
        groups, channels_per_group, steps, stretches, STRETCHES, CHANNELS, TOKENS
    )  # fmt: skip
    at = start + tl.arange(0, TOKENS)[None, None, :]
    record = batch * groups * channels_per_group + channel
    x_ptr += batch * x_batch + channel * (3 * x_row if GATED else x_row)
    y_ptr += batch * y_batch + channel * y_row
    projection_history_ptr += record * 6
    history_ptr += record * (width - 1)
    taps_ptr += group * width
    post_taps, pre_taps, value_taps = (), (), ()
    if GATED:
        post_taps, pre_taps, value_taps = tiles.load_projection_taps(projection_taps_ptr + channel * 9, real)
    if SKIP:
        skip = tl.load(skip_ptr + channel, mask=real, other=0.0).to(tl.float32)
    block0 = tiles.toeplitz(taps_ptr, width, 0, IMPULSE, TOKENS, OPERAND)
    block1 = tiles.toeplitz(taps_ptr, width, 1, IMPULSE, TOKENS, OPERAND)
    block2 = tiles.toeplitz(taps_ptr, width, 2, IMPULSE, TOKENS, OPERAND) if BLOCKS == 3 else block1
    past1 = tiles.load_inputs(
        x_ptr, x_row, projection_history_ptr, history_ptr, pre_taps, value_taps, at - TOKENS, real, length, width,
        GATED, HISTORY, HISTORY, GROUP,
    )  # fmt: skip
    past1 = tiles.operand(past1, OPERAND)
    past2 = past1
    if BLOCKS == 3:
        past2 = tiles.load_inputs(
            x_ptr, x_row, projection_history_ptr, history_ptr, pre_taps, value_taps, at - 2 * TOKENS, real, length,
            width, GATED, HISTORY, HISTORY, GROUP,
        )  # fmt: skip
        past2 = tiles.operand(past2, OPERAND)
    for _ in range(steps):
        if GATED:  # Asked for first: it is needed last.
            post = tiles.load_groups(x_ptr, projection_history_ptr, at, real, length, HISTORY, GROUP)
        inputs = tiles.load_inputs(
            x_ptr, x_row, projection_history_ptr, history_ptr, pre_taps, value_taps, at, real, length, width,
            GATED, HISTORY, False, GROUP,
        )  # fmt: skip
        tokens = tiles.operand(inputs, OPERAND)
        y = tiles.through((block0, block1, block2), tokens, past1, past2, inputs, BLOCKS, PRECISION)
        if BLOCKS == 3:
            past2 = past1
        past1 = tokens
        # The gate first: a tile that meets a product moves to its layout, and the product's result is the one to move.
        gate = tiles.filtered(tiles.delays(post, GROUP), post_taps) if GATED else 1.0
        y *= gate
        if SKIP:
            y += gate * skip * inputs
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=real & (at < length))
        at += TOKENS
