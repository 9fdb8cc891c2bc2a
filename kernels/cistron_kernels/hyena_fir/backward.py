"""Triton kernel of the finite filters, backward: one pass over memory, from the last token to the first.

Outputs are computed again from the inputs; gradients of filters are summed in registers over all chunks of a program.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from cistron_kernels.hyena_fir import tiles


@triton.jit
def _next_group(x):
    """Return x [S, H, N] with every column replaced by the next one, and the last one by the first."""
    groups: tl.constexpr = x.shape[2]
    return tl.gather(x, tl.broadcast_to((tl.arange(0, groups)[None, None, :] + 1) % groups, x.shape), 2)


@triton.jit
def _leave(d, shifted, taps, later, sums, grad_ptr, at, mask, GROUP: tl.constexpr):
    """Take the gradient d [S, H, C] of the output of a filter of three taps to its input and to its taps.

    `shifted` is the input, and the same one token and two tokens earlier. `later` has what is returned for the chunk
    before this one, with the sums: for each group of the chunk after this one, the first two columns of the next group.
    """
    groups: tl.constexpr = d.shape[2] // GROUP
    end = tl.arange(0, groups)[None, None, :] == groups - 1
    first, second = tiles.first_two_of_groups(d, GROUP)
    first, second = _next_group(first), _next_group(second)
    one = tiles.advanced(d, tl.where(end, later[0], first), GROUP)
    two = tiles.advanced(one, tl.where(end, later[1], second), GROUP)
    grad = taps[2] * d + taps[1] * one + taps[0] * two
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    d = tl.where(mask, d, 0.0)
    oldest = sums[0] + _within_threads(d * shifted[2], GROUP)
    older = sums[1] + _within_threads(d * shifted[1], GROUP)
    return (first, second), (oldest, older, sums[2] + _within_threads(d * shifted[0], GROUP))


@triton.jit
def _within_threads(x, GROUP: tl.constexpr):
    """Return the sums over what a thread has of x [S, H, C], [S/2, H, C/G]: the rest is summed once, at the end."""
    pairs: tl.constexpr = (x.shape[0] + 1) // 2
    x = tl.reshape(x, (x.shape[0] // pairs, pairs, x.shape[1], x.shape[2] // GROUP, GROUP))
    return tl.sum(tl.sum(x, axis=4), axis=0)


@triton.jit
def _diagonals(x, TOKENS: tl.constexpr):
    """Return the sums of x [C, C] over row - column = m and over row - column = m - C, both [C]."""
    row, lag = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    skewed = tl.gather(x, (row - lag + TOKENS) % TOKENS, 1)
    return tl.sum(tl.where(row >= lag, skewed, 0.0), axis=0), tl.sum(tl.where(row >= lag, 0.0, skewed), axis=0)


@triton.jit
def _over_tokens(sums):
    """Return [1, H, 1], the sums over stretches and groups of [S, H, C/G]."""
    return tl.sum(tl.sum(sums, axis=2, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _store_taps(ptr, sums, real):
    """Store the gradients of three taps of each channel."""
    tl.store(ptr, _over_tokens(sums[0]), mask=real)
    tl.store(ptr + 1, _over_tokens(sums[1]), mask=real)
    tl.store(ptr + 2, _over_tokens(sums[2]), mask=real)


@triton.jit
def _store_lags(ptr, sums, lag, width, IMPULSE: tl.constexpr):
    """Store the gradients of the taps of these lags where the taps are."""
    at = lag if IMPULSE else width - 1 - lag
    tl.store(ptr + at, sums, mask=lag < width)


@triton.jit
def _load_outgoing(
    grad_y_ptr, x_ptr, projection_history_ptr, post_taps, at, real, length,
    GATED: tl.constexpr, HISTORY: tl.constexpr, GROUP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the filter's output at tokens `at`, as an operand."""
    grad = tl.load(grad_y_ptr + at, mask=real & (at < length), other=0.0).to(tl.float32)
    if GATED:
        grad *= tiles.load_filtered(x_ptr, projection_history_ptr, post_taps, at, real, length, HISTORY, GROUP)
    return tiles.operand(grad, OPERAND)


@triton.jit
def _chunk(
    grad_y_ptr, grad_x_ptr, grad_x_row, x_ptr, x_row, projection_history_ptr, history_ptr, projection_taps_ptr, skip,
    blocks, turned, at, stop, real, length, width, past1, later1, later2, starts, sums,
    GATED: tl.constexpr, SKIP: tl.constexpr, HISTORY: tl.constexpr, BLOCKS: tl.constexpr,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through one chunk; return what the chunk before it needs, and the sums with this chunk's share.

    Tokens from `stop` on are another program's: only the chunk before needs them.
    """
    taps = tiles.load_projection_taps(projection_taps_ptr, real) if GATED else ((), (), ())
    inputs = tiles.load_inputs(
        x_ptr, x_row, projection_history_ptr, history_ptr, taps[1], taps[2], at, real, length, width,
        GATED, HISTORY, False, GROUP,
    )  # fmt: skip
    past2 = tiles.load_inputs(
        x_ptr, x_row, projection_history_ptr, history_ptr, taps[1], taps[2], at - (BLOCKS - 1) * at.shape[2], real,
        length, width, GATED, HISTORY, HISTORY, GROUP,
    )  # fmt: skip
    tokens, past2 = tiles.operand(inputs, OPERAND), tiles.operand(past2, OPERAND)
    if BLOCKS == 2:
        past1 = past2
    grad = tl.load(grad_y_ptr + at, mask=real & (at < length), other=0.0)
    mask = real & (at < length) & (at < stop)
    if GATED:
        post = tiles.load_groups(x_ptr, projection_history_ptr, at, real, length, HISTORY, GROUP)
    post_starts, pre_starts, value_starts = starts
    skip_sum, post_sums, pre_sums, value_sums, sum0, sum1, sum2 = sums
    if GATED:
        z = tiles.through(blocks, tokens, past1, past2, inputs, BLOCKS, PRECISION)
        post, outgoing = tiles.delays(post, GROUP), grad.to(tl.float32)
        d = tiles.times(outgoing, z)
        if SKIP:
            d += outgoing * skip * tl.reshape(tokens, inputs.shape).to(tl.float32)
        post_taps = tiles.load_taps(projection_taps_ptr, real)
        outgoing *= tiles.filtered(post, post_taps)
        post_starts, post_sums = _leave(
            d, post, post_taps, post_starts, post_sums, grad_x_ptr, at, mask, GROUP
        )  # fmt: skip
    else:
        outgoing = grad.to(tl.float32)
    later = tiles.operand(outgoing, OPERAND)
    counted = tl.where(at < stop, outgoing, 0.0) if GATED else outgoing
    if SKIP:
        skip_sum += _within_threads(counted * tl.reshape(tokens, inputs.shape).to(tl.float32), GROUP)
    counted = tl.trans(tiles.operand(counted, OPERAND))
    sum0 = tl.dot(counted, tokens, sum0, input_precision=PRECISION)
    sum1 = tl.dot(counted, past1, sum1, input_precision=PRECISION)
    if BLOCKS == 3:
        sum2 = tl.dot(counted, past2, sum2, input_precision=PRECISION)
    d = tiles.through(turned, later, later1, later2, inputs, BLOCKS, PRECISION)
    # From here on, what was read is read again: it is near, and registers are scarcer than loads.
    skipped = skip * tl.reshape(later, inputs.shape).to(tl.float32) if SKIP else 0.0
    if GATED:
        taps = tiles.load_projection_taps(projection_taps_ptr, real)
        pre_ptr, value_ptr = x_ptr + x_row, x_ptr + 2 * x_row
        pre_history_ptr, value_history_ptr = projection_history_ptr + 2, projection_history_ptr + 4
        pre = tiles.delays(tiles.load_groups(pre_ptr, pre_history_ptr, at, real, length, HISTORY, GROUP), GROUP)
        value = tiles.delays(tiles.load_groups(value_ptr, value_history_ptr, at, real, length, HISTORY, GROUP), GROUP)
        gate = tiles.filtered(value, taps[2])
        d_pre = tiles.times(gate, d) + gate * skipped
        pre_starts, pre_sums = _leave(
            d_pre, pre, taps[1], pre_starts, pre_sums, grad_x_ptr + grad_x_row, at, mask, GROUP
        )  # fmt: skip
        gate = tiles.filtered(pre, taps[1])
        d_value = tiles.times(gate, d) + gate * skipped
        value_starts, value_sums = _leave(
            d_value, value, taps[2], value_starts, value_sums, grad_x_ptr + 2 * grad_x_row, at, mask, GROUP
        )  # fmt: skip
    else:
        tl.store(grad_x_ptr + at, (d + skipped).to(grad_x_ptr.dtype.element_ty), mask=mask)
    sums = (skip_sum, post_sums, pre_sums, value_sums, sum0, sum1, sum2)
    return past2, later, later1, (post_starts, pre_starts, value_starts), sums


@triton.jit
def backward_kernel(
    x_ptr, projection_history_ptr, projection_taps_ptr, history_ptr, taps_ptr, skip_ptr, grad_y_ptr,
    grad_x_ptr, projection_taps_partial_ptr, taps_partial_ptr, skip_partial_ptr,
    x_batch, x_row, grad_y_batch, grad_y_row, grad_x_batch, grad_x_row,
    length, groups, channels_per_group, width, steps, stretches,
    GATED: tl.constexpr, SKIP: tl.constexpr, HISTORY: tl.constexpr, IMPULSE: tl.constexpr, BLOCKS: tl.constexpr,
    STRETCHES: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x and this program's share of those of the filters, for its stretches of its channels."""
    batch = tl.program_id(1).to(tl.int64)
    group, channel, real, start = tiles.place(
        groups, channels_per_group, steps, stretches, STRETCHES, CHANNELS, TOKENS
    )  # fmt: skip
    channels = groups * channels_per_group
    x_ptr += batch * x_batch + channel * (3 * x_row if GATED else x_row)
    grad_x_ptr += batch * grad_x_batch + channel * (3 * grad_x_row if GATED else grad_x_row)
    grad_y_ptr += batch * grad_y_batch + channel * grad_y_row
    projection_history_ptr += (batch * channels + channel) * 6
    history_ptr += (batch * channels + channel) * (width - 1)
    taps_ptr += group * width
    projection_taps_ptr += channel * 9
    taps = tiles.load_projection_taps(projection_taps_ptr, real) if GATED else ((), (), ())
    skip = tl.load(skip_ptr + channel, mask=real, other=0.0).to(tl.float32) if SKIP else 0.0
    block0 = tiles.toeplitz(taps_ptr, width, 0, IMPULSE, TOKENS, OPERAND)
    block1 = tiles.toeplitz(taps_ptr, width, 1, IMPULSE, TOKENS, OPERAND)
    block2 = tiles.toeplitz(taps_ptr, width, 2, IMPULSE, TOKENS, OPERAND) if BLOCKS == 3 else block1
    blocks = (block0, block1, block2)
    turned = (tl.trans(block0), tl.trans(block1), tl.trans(block2))
    # The filter of the projection reaches two tokens into the chunk after the last, which is gone through as well.
    chunks = steps + 1 if GATED else steps
    # Without a way around the loop, what stands after it is computed after it: no register keeps it through the loop.
    tl.assume(chunks > 0)
    stop = start + steps * TOKENS
    at = start + chunks * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    later1 = _load_outgoing(
        grad_y_ptr, x_ptr, projection_history_ptr, taps[0], at, real, length, GATED, HISTORY, GROUP, OPERAND
    )  # fmt: skip
    later2 = later1
    if BLOCKS == 3:
        later2 = _load_outgoing(
            grad_y_ptr, x_ptr, projection_history_ptr, taps[0], at + TOKENS, real, length, GATED, HISTORY, GROUP,
            OPERAND,
        )  # fmt: skip
    past1 = tiles.load_inputs(
        x_ptr, x_row, projection_history_ptr, history_ptr, taps[1], taps[2], at - 2 * TOKENS, real, length, width,
        GATED, HISTORY, HISTORY, GROUP,
    )  # fmt: skip
    past1 = tiles.operand(past1, OPERAND)
    few = tl.zeros((STRETCHES, CHANNELS, TOKENS // GROUP), dtype=tl.float32)
    starts = ((few, few), (few, few), (few, few))
    few = tl.zeros(((STRETCHES + 1) // 2, CHANNELS, TOKENS // GROUP), dtype=tl.float32)
    many = tl.zeros((TOKENS, TOKENS), dtype=tl.float32)
    sums = (few, (few, few, few), (few, few, few), (few, few, few), many, many, many)
    for _ in range(chunks):
        at -= TOKENS
        past1, later1, later2, starts, sums = _chunk(
            grad_y_ptr, grad_x_ptr, grad_x_row, x_ptr, x_row, projection_history_ptr, history_ptr, projection_taps_ptr,
            skip, blocks, turned, at, stop, real, length, width, past1, later1, later2, starts, sums,
            GATED, SKIP, HISTORY, BLOCKS, GROUP, OPERAND, PRECISION,
        )  # fmt: skip
    skip_sum, post_sums, pre_sums, value_sums, sum0, sum1, sum2 = sums
    share = batch * stretches + tl.program_id(0) % stretches
    if GATED:
        projection_taps_partial_ptr += (share * channels + channel) * 9
        _store_taps(projection_taps_partial_ptr, post_sums, real)
        _store_taps(projection_taps_partial_ptr + 3, pre_sums, real)
        _store_taps(projection_taps_partial_ptr + 6, value_sums, real)
    if SKIP:
        tl.store(skip_partial_ptr + share * channels + channel, _over_tokens(skip_sum), mask=real)
    lag = tl.arange(0, TOKENS)
    tiles_of_all = tl.num_programs(0) // stretches
    taps_partial_ptr += (share * tiles_of_all + tl.program_id(0) // stretches) * width
    here, _ = _diagonals(sum0, TOKENS)
    there, back = _diagonals(sum1, TOKENS)
    _store_lags(taps_partial_ptr, here + back, lag, width, IMPULSE)
    if BLOCKS == 3:
        beyond, back = _diagonals(sum2, TOKENS)
        there += back
        _store_lags(taps_partial_ptr, beyond, 2 * TOKENS + lag, width, IMPULSE)
    _store_lags(taps_partial_ptr, there, TOKENS + lag, width, IMPULSE)
