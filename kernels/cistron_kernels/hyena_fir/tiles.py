"""What the kernels of the finite filters share: where a program stands, its tiles, their shifts, its Toeplitz blocks.

A tile is [S, H, C]: C tokens, a chunk, of each of S stretches of H channels that share a filter. It enters a matrix
product as S x H rows. Legend: K taps, G neighbouring tokens that one thread holds, which is one 16-byte load.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(
    groups, channels_per_group, steps, stretches,
    STRETCHES: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Return the group of a program, its channels [1, H, 1], which of them exist, and where its stretches start."""
    stretch, tile = tl.program_id(0) % stretches, tl.program_id(0) // stretches
    parts = tl.cdiv(channels_per_group, CHANNELS)
    within = tile % parts * CHANNELS + tl.arange(0, CHANNELS)[None, :, None]
    channel = (tile // parts * channels_per_group + within).to(tl.int64)
    start = (stretch * STRETCHES + tl.arange(0, STRETCHES)[:, None, None]) * steps * TOKENS
    return tile // parts, channel, within < channels_per_group, start


@triton.jit
def halves(x):
    """Return the even and the odd columns of x [S, H, N]; a thread's own neighbours, so nothing moves."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def last_two_of_groups(x, GROUP: tl.constexpr):
    """Return the last column but one and the last of every group of x [S, H, C], both [S, H, C/G]."""
    even, odd = halves(x)
    if GROUP == 8:
        even, odd = halves(even)[1], halves(odd)[1]
    return halves(even)[1], halves(odd)[1]


@triton.jit
def first_two_of_groups(x, GROUP: tl.constexpr):
    """Return the first and the second column of every group of x [S, H, C], both [S, H, C/G]."""
    even, odd = halves(x)
    if GROUP == 8:
        even, odd = halves(even)[0], halves(odd)[0]
    return halves(even)[0], halves(odd)[0]


@triton.jit
def delayed(x, last, GROUP: tl.constexpr):
    """Return x [S, H, C] one token later; `last` [S, H, C/G] is what every group gets from the one before it."""
    even, odd = halves(x)
    inner_even, inner_odd = halves(odd)
    if GROUP == 8:
        last = tl.interleave(last, halves(inner_odd)[0])
    return tl.interleave(tl.interleave(last, inner_even), even)


@triton.jit
def advanced(x, first, GROUP: tl.constexpr):
    """Return x [S, H, C] one token earlier; `first` [S, H, C/G] is what every group gets from the one after it."""
    even, odd = halves(x)
    inner_even, inner_odd = halves(even)
    if GROUP == 8:
        first = tl.interleave(halves(inner_even)[1], first)
    return tl.interleave(odd, tl.interleave(inner_odd, first))


@triton.jit
def load_groups(row_ptr, history_ptr, at, real, length, HISTORY: tl.constexpr, GROUP: tl.constexpr):
    """Return tokens `at` [S, H, C] of the rows, and the tokens one group earlier, of which two are needed.

    The group before comes from memory, where the neighbouring thread has just read it: that costs less than shuffling.
    Before a row's first token stand the two of its history, or zeros.
    """
    row_ptr += at
    x = tl.load(row_ptr, mask=real & (at >= 0) & (at < length), other=0.0)
    at -= GROUP
    before = tl.load(row_ptr - GROUP, mask=real & (at >= 0) & (at < length), other=0.0)
    if HISTORY:
        before = tl.load(history_ptr + at + 2, mask=real & (at >= -2) & (at < 0), other=before)
    return x, before


@triton.jit
def delays(loaded, GROUP: tl.constexpr):
    """Return the tokens that `load_groups` read in fp32, then those one earlier and those two earlier."""
    now = loaded[0].to(tl.float32)
    older, newer = last_two_of_groups(loaded[1].to(tl.float32), GROUP)
    one = delayed(now, newer, GROUP)
    return now, one, delayed(one, older, GROUP)


@triton.jit
def load_taps(taps_ptr, real):
    """Return the three taps of the channels, the current token's last."""
    oldest = tl.load(taps_ptr, mask=real, other=0.0).to(tl.float32)
    older = tl.load(taps_ptr + 1, mask=real, other=0.0).to(tl.float32)
    return oldest, older, tl.load(taps_ptr + 2, mask=real, other=0.0).to(tl.float32)


@triton.jit
def load_projection_taps(taps_ptr, real):
    """Return the taps of post-gate, pre-gate and value."""
    return load_taps(taps_ptr, real), load_taps(taps_ptr + 3, real), load_taps(taps_ptr + 6, real)


@triton.jit
def filtered(shifted, taps):
    """Return the filter of three taps over the result of `delays`."""
    return taps[2] * shifted[0] + taps[1] * shifted[1] + taps[0] * shifted[2]


@triton.jit
def load_filtered(row_ptr, history_ptr, taps, at, real, length, HISTORY: tl.constexpr, GROUP: tl.constexpr):
    """Return tokens `at` [S, H, C] of the rows after the filter of three taps, in fp32."""
    return filtered(delays(load_groups(row_ptr, history_ptr, at, real, length, HISTORY, GROUP), GROUP), taps)


@triton.jit
def load_inputs(
    x_ptr, x_row, projection_history_ptr, history_ptr, pre_taps, value_taps, at, real, length, width,
    GATED: tl.constexpr, HISTORY: tl.constexpr, BEFORE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return the inputs of the filter at tokens `at` [S, H, C], in fp32: x, or pre-gate times value.

    BEFORE says that tokens before the first may be among them, whose inputs the history has.
    """
    if GATED:
        pre = load_groups(x_ptr + x_row, projection_history_ptr + 2, at, real, length, HISTORY, GROUP)
        value = load_groups(x_ptr + 2 * x_row, projection_history_ptr + 4, at, real, length, HISTORY, GROUP)
        inputs = filtered(delays(pre, GROUP), pre_taps) * filtered(delays(value, GROUP), value_taps)
    else:
        inputs = tl.load(x_ptr + at, mask=real & (at >= 0) & (at < length), other=0.0).to(tl.float32)
    if BEFORE:
        past = tl.load(history_ptr + at + width - 1, mask=real & (at < 0) & (at > -width), other=0.0)
        inputs = tl.where(at < 0, past.to(tl.float32), inputs)
    return inputs


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """Return x [S, H, C] as an operand of a matrix product, [S H, C]."""
    return tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])).to(OPERAND)


@triton.jit
def toeplitz(taps_ptr, width, BLOCK: tl.constexpr, IMPULSE: tl.constexpr, TOKENS: tl.constexpr, OPERAND: tl.constexpr):
    """Return [C, C], the outputs (rows) from the inputs (columns) BLOCK chunks earlier."""
    lag = tl.arange(0, TOKENS)[:, None] - tl.arange(0, TOKENS)[None, :] + BLOCK * TOKENS
    at = lag if IMPULSE else width - 1 - lag
    return tl.load(taps_ptr + at, mask=(lag >= 0) & (lag < width), other=0.0).to(OPERAND)


@triton.jit
def through(blocks, tokens, other1, other2, like, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """Return, as a tile, the sum of the blocks times the tokens [S H, C] of three chunks (of two, where BLOCKS = 2)."""
    y = tl.dot(blocks[0], tl.trans(tokens), input_precision=PRECISION)
    y = tl.dot(blocks[1], tl.trans(other1), y, input_precision=PRECISION)
    if BLOCKS == 3:
        y = tl.dot(blocks[2], tl.trans(other2), y, input_precision=PRECISION)
    return tl.reshape(tl.trans(y), like.shape)


@triton.jit
def times(x, product):
    """Return x [S, H, C] times the result of `through`, in the layout of x.

    Written by halves, which no matrix product's layout can be split into: otherwise everything would move to that one.
    """
    x_even, x_odd = halves(x)
    even, odd = halves(product)
    return tl.interleave(x_even * even, x_odd * odd)
