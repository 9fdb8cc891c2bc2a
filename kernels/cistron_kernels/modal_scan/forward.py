"""Triton kernel of the modal scan: a program takes one channel of one row through its whole length, in one pass.

A tile is R chunks of C tokens, which stand in memory as the rows of a matrix: products inside chunks, into states and
out of them are matrix products, and only one state per chunk goes through the recurrence.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from cistron_kernels.modal_scan import tiles


@triton.jit
def forward_kernel(
    x_ptr, history_ptr, taps_ptr, skip_ptr, log_poles_ptr, residues_ptr, state_ptr, lengths_ptr,
    y_ptr, carry_ptr, final_ptr, slope_ptr, channels, length, real, poles, x_batch_stride, x_row_stride,
    y_batch_stride, y_row_stride,
    GATED: tl.constexpr, HISTORY: tl.constexpr, STATE: tl.constexpr, LENGTHS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, POLES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Write y of one channel of one row, the state after its last real token, and every KEEP tokens the one carried.

    Beside the final state stands its slope by the log poles, for a given state before the chunk that it is in: that
    spares the backward kernel a second look at the chunk.
    """
    program = tl.program_id(0).to(tl.int64)
    batch, channel = program // channels, program % channels
    pole = tl.arange(0, POLES)
    log_poles = tl.load(log_poles_ptr + channel * poles + pole, mask=pole < poles, other=-1.0)
    residues = tl.load(residues_ptr + channel * poles + pole, mask=pole < poles, other=0.0)
    state = tl.zeros((POLES,), dtype=tl.float32)
    if STATE:
        state = tl.load(state_ptr + program * poles + pole, mask=pole < poles, other=0.0)
    inner = tiles.toeplitz(log_poles, residues, CHUNK).to(OPERAND)
    into_high, into_low = tiles.two_parts(tiles.to_state(log_poles, CHUNK), OPERAND)
    out_of = tiles.from_state(log_poles, residues, CHUNK)
    row = tl.arange(0, ROWS)
    carried = tl.exp((row * CHUNK)[:, None] * log_poles[None, :])
    end = tl.load(lengths_ptr + batch).to(tl.int32) if LENGTHS else real
    last_chunk = tl.maximum(end - 1, 0) // CHUNK
    last_state = state
    num_tiles = tl.cdiv(length, ROWS * CHUNK)
    x_ptr += batch * x_batch_stride + channel * (3 * x_row_stride if GATED else x_row_stride)
    history_ptr += program * 6
    y_ptr += batch * y_batch_stride + channel * y_row_stride
    carry_ptr += program * tl.cdiv(length, KEEP) * poles
    if GATED:
        taps_ptr += channel * 9
    for tile in range(num_tiles):
        first = tile * ROWS * CHUNK
        if GATED:
            tokens = tiles.load_gated(
                x_ptr, x_row_stride, history_ptr, taps_ptr, first, length, HISTORY, ROWS, CHUNK
            ).to(OPERAND)
        else:
            tokens = tiles.load_tokens(x_ptr, first, length, ROWS, CHUNK).to(OPERAND)
        added = tiles.times_two_parts(tokens, into_high, into_low, OPERAND, PRECISION)
        after = tiles.accumulate(added, log_poles * CHUNK, False)
        states = tiles.row_before(after, 0.0, ROWS) + carried * state[None, :]
        at = first + row[:, None] * CHUNK
        kept = (at % KEEP == 0) & (at < length) & (pole < poles)[None, :]
        tl.store(carry_ptr + at // KEEP * poles + pole[None, :], states, mask=kept)
        y = tl.dot(tokens, inner, input_precision=PRECISION)
        y = tl.dot(states, out_of, y, input_precision=PRECISION)
        if last_chunk // ROWS == tile:
            last_state = tl.sum(tl.where((row == last_chunk % ROWS)[:, None], states, 0.0), axis=0)
        state = tl.exp(ROWS * CHUNK * log_poles) * state + tl.sum(
            tl.where((row == ROWS - 1)[:, None], after, 0.0), axis=0
        )
        if GATED:
            post = tiles.load_filtered(x_ptr, history_ptr, taps_ptr, first, length, HISTORY, ROWS, CHUNK)
            y = post * (y + tl.load(skip_ptr + channel).to(tl.float32) * tokens.to(tl.float32))
        tiles.store_tokens(y_ptr, y, first, length, ROWS, CHUNK)
    first = last_chunk * CHUNK
    if GATED:
        tokens = tiles.load_gated(x_ptr, x_row_stride, history_ptr, taps_ptr, first, length, HISTORY, 1, CHUNK)
    else:
        tokens = tiles.load_tokens(x_ptr, first, length, 1, CHUNK).to(tl.float32)
    rest = end - first
    token = tl.arange(0, CHUNK)
    tokens = tl.where(token < rest, tl.reshape(tokens, (CHUNK,)), 0.0)  # Padding may hold anything, NaN too.
    powers = tiles.ahead(log_poles, rest, CHUNK) * tokens[:, None]
    last_state *= tl.exp(rest * log_poles)
    slope = tl.sum((rest - 1 - token)[:, None] * powers, axis=0) + rest * last_state
    tl.store(final_ptr + program * poles + pole, tl.sum(powers, axis=0) + last_state, mask=pole < poles)
    tl.store(slope_ptr + program * poles + pole, slope, mask=pole < poles)
