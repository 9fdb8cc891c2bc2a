"""Parts of the scan's kernels: the matrices of a channel, tiles of its tokens, and the recurrence between chunks.

Shape legend: R chunks of a tile (its rows), C tokens of a chunk, S poles (padded to a power of two), G groups of eight
neighbouring tokens of a chunk.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_state(log_poles, CHUNK: tl.constexpr):
    """Return [C, S], what each token of a chunk adds to the state after it."""
    ahead = (CHUNK - 1) - tl.arange(0, CHUNK)
    return tl.exp(ahead[:, None] * log_poles[None, :])


@triton.jit
def from_state(log_poles, residues, CHUNK: tl.constexpr):
    """Return [S, C], from the state before a chunk to its outputs."""
    return residues[:, None] * tl.exp((tl.arange(0, CHUNK) + 1)[None, :] * log_poles[:, None])


@triton.jit
def toeplitz(log_poles, residues, CHUNK: tl.constexpr):
    """Return [C, C], from the tokens of a chunk (rows) to its outputs."""
    lag = tl.arange(0, CHUNK)
    taps = tl.sum(residues[:, None] * tl.exp(lag[None, :] * log_poles[:, None]), axis=0)
    at = tl.arange(0, CHUNK * CHUNK)
    behind = at % CHUNK - at // CHUNK
    product = tl.where(behind >= 0, tl.gather(taps, tl.maximum(behind, 0), 0), 0.0)
    return tl.reshape(product, (CHUNK, CHUNK))


@triton.jit
def ahead(log_poles, count, CHUNK: tl.constexpr):
    """Return [C, S], what the tokens of a chunk add to the state after its first `count`."""
    tokens = count - 1 - tl.arange(0, CHUNK)[:, None]
    return tl.where(tokens >= 0, tl.exp(tl.maximum(tokens, 0) * log_poles[None, :]), 0.0)


@triton.jit
def diagonals(x, CHUNK: tl.constexpr):
    """Return the sums of the diagonals of x [C, C], from the main one to the right."""
    at = tl.arange(0, CHUNK)
    column = at[:, None] + at[None, :]
    moved = tl.gather(x, tl.minimum(column, CHUNK - 1), 1)
    return tl.sum(tl.where(column < CHUNK, moved, 0.0), axis=0)


@triton.jit
def parameter_gradients(log_poles, residues, lags, grad_into, grad_out_of, grad_decay, CHUNK: tl.constexpr):
    """Return the gradients of log poles and residues [S] from those of a channel's matrices and of its decay."""
    at = tl.arange(0, CHUNK)
    powers = tl.exp(at[None, :] * log_poles[:, None])
    next_powers = tl.exp((at + 1)[None, :] * log_poles[:, None])
    inner, out_of = powers * lags[None, :], next_powers * grad_out_of
    ahead = (CHUNK - 1) - at
    into = ahead[:, None] * tl.exp(ahead[:, None] * log_poles[None, :]) * grad_into
    grad_residues = tl.sum(inner + out_of, axis=1)
    grad_log_poles = residues * tl.sum(at[None, :] * inner + (at + 1)[None, :] * out_of, axis=1)
    grad_log_poles += tl.sum(into, axis=0) + CHUNK * tl.exp(CHUNK * log_poles) * grad_decay
    return grad_log_poles, grad_residues


@triton.jit
def two_parts(x, OPERAND: tl.constexpr):
    """Return x as the sum of two matrices of the operand type, which hold twice its digits."""
    high = x.to(OPERAND)
    return high, (x - high.to(tl.float32)).to(OPERAND)


@triton.jit
def times_two_parts(x, high, low, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return x @ (high + low); fp32 operands are whole in `high`."""
    product = tl.dot(x, high, input_precision=PRECISION)
    if tl.float32 != OPERAND:
        product = tl.dot(x, low, product)
    return product


@triton.jit
def row_before(x, first, ROWS: tl.constexpr):
    """Return x [R, S] moved down by one row, with `first` on top."""
    row = tl.arange(0, ROWS)[:, None]
    return tl.where(row == 0, first, tl.gather(x, tl.broadcast_to(tl.maximum(row - 1, 0), x.shape), 0))


@triton.jit
def row_after(x, last, ROWS: tl.constexpr):
    """Return x [R, S] moved up by one row, with `last` at the bottom."""
    row = tl.arange(0, ROWS)[:, None]
    return tl.where(row == ROWS - 1, last, tl.gather(x, tl.broadcast_to(tl.minimum(row + 1, ROWS - 1), x.shape), 0))


@triton.jit
def _compose(first_decay, first, second_decay, second):
    return first_decay * second_decay, second_decay * first + second


@triton.jit
def accumulate(x, log_decay, REVERSE: tl.constexpr):
    """Return y with y[i] = exp(log_decay) * y[i - 1] + x[i] along the rows, or from the last row up."""
    decay = tl.broadcast_to(tl.exp(log_decay)[None, :], x.shape)
    return tl.associative_scan((decay, x), 0, _compose, reverse=REVERSE)[1]


@triton.jit
def eight(x):
    """Return the eight columns of the last dimension of x [R, G, 8]; what moves are names, not numbers."""
    rows: tl.constexpr = x.shape[0]
    groups: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (rows, groups, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (rows, groups, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (rows, groups, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def joined(x0, x1, x2, x3, x4, x5, x6, x7):
    """Return [R, G, 8] from its eight columns."""
    rows: tl.constexpr = x0.shape[0]
    groups: tl.constexpr = x0.shape[1]
    even = tl.reshape(tl.join(tl.join(x0, x4), tl.join(x2, x6)), (rows, groups, 4))
    odd = tl.reshape(tl.join(tl.join(x1, x5), tl.join(x3, x7)), (rows, groups, 4))
    return tl.reshape(tl.join(even, odd), (rows, groups, 8))


@triton.jit
def load_tokens(row_ptr, first, length, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Return tokens first, first + 1, ... of a row, [R, C]; zeros from its end on."""
    at = first + tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(row_ptr + at, mask=at < length, other=0.0)


@triton.jit
def store_tokens(row_ptr, x, first, length, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Write x [R, C] to tokens first, first + 1, ... of a row, as far as it goes."""
    at = first + tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(row_ptr + at, x.to(row_ptr.dtype.element_ty), mask=at < length)


@triton.jit
def load_delayed(row_ptr, history_ptr, first, length, HISTORY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Return tokens first, first + 1, ... of a row, as [R, G, 8] in fp32, then those one and two earlier.

    Every thread holds eight tokens, one load of 16 bytes in bf16; it takes the two before them in one more, and shifts
    in its registers. Before the row's first token stand the two of its history, or zeros.
    """
    group = tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK // 8)[None, :] * 8 + first
    at = group[:, :, None] + tl.arange(0, 8)[None, None, :]
    x = tl.load(row_ptr + at, mask=at < length, other=0.0).to(tl.float32)
    at = group[:, :, None] + (tl.arange(0, 2) - 2)[None, None, :]
    older, newer = tl.split(tl.load(row_ptr + at, mask=(at >= 0) & (at < length), other=0.0).to(tl.float32))
    if HISTORY:
        older = tl.where(group == 0, tl.load(history_ptr).to(tl.float32), older)
        newer = tl.where(group == 0, tl.load(history_ptr + 1).to(tl.float32), newer)
    x0, x1, x2, x3, x4, x5, x6, _ = eight(x)
    return x, joined(newer, x0, x1, x2, x3, x4, x5, x6), joined(older, newer, x0, x1, x2, x3, x4, x5)


@triton.jit
def load_taps(taps_ptr):
    """Return the three taps of a row; the current token's is the last."""
    return (
        tl.load(taps_ptr).to(tl.float32),
        tl.load(taps_ptr + 1).to(tl.float32),
        tl.load(taps_ptr + 2).to(tl.float32),
    )


@triton.jit
def filtered(delays, taps):
    """Return the tokens after the row's filter, from the row now, one and two tokens earlier."""
    return taps[2] * delays[0] + taps[1] * delays[1] + taps[0] * delays[2]


@triton.jit
def load_filtered(
    row_ptr, history_ptr, taps_ptr, first, length, HISTORY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """Return tokens of a row after its filter, [R, C] in fp32."""
    delays = load_delayed(row_ptr, history_ptr, first, length, HISTORY, ROWS, CHUNK)
    return tl.reshape(filtered(delays, load_taps(taps_ptr)), (ROWS, CHUNK))


@triton.jit
def load_gated(
    rows_ptr,
    stride,
    history_ptr,
    taps_ptr,
    first,
    length,
    HISTORY: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the scan's input [R, C]: the product of a channel's second and third filtered rows."""
    pre = load_filtered(rows_ptr + stride, history_ptr + 2, taps_ptr + 3, first, length, HISTORY, ROWS, CHUNK)
    value = load_filtered(rows_ptr + 2 * stride, history_ptr + 4, taps_ptr + 6, first, length, HISTORY, ROWS, CHUNK)
    return pre * value
