"""Triton kernel of the modal scan's gradients: one sweep from the last tile of a channel to its first.

What the forward pass carried into each tile starts its recurrence again, so states need no sweep of their own.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from cistron_kernels.modal_scan import tiles


@triton.jit
def _load_ahead(row_ptr, group, end):
    """Return the eight tokens of each group [R, G] that starts at `group`, [R, G, 8], and the two after them."""
    at = group[:, :, None] + tl.arange(0, 8)[None, None, :]
    x = tl.load(row_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    at = group[:, :, None] + 8 + tl.arange(0, 2)[None, None, :]
    later0, later1 = tl.split(tl.load(row_ptr + at, mask=at < end, other=0.0).to(tl.float32))
    return x, later0, later1


@triton.jit
def _filter_ahead(x, later0, later1, taps):
    """Return what the filter makes of the two tokens after each group of eight."""
    _, _, _, _, _, _, x6, x7 = tiles.eight(x)
    return taps[2] * later0 + taps[1] * x7 + taps[0] * x6, taps[2] * later1 + taps[1] * later0 + taps[0] * x7


@triton.jit
def _in_threads(x):
    """Return sums [R / 2, G] of x [R, G, 8] over numbers that one thread holds."""
    x = tl.sum(x, axis=2)
    return tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), axis=0)


@triton.jit
def _through_filter(row_ptr, grad, later0, later1, delays, taps, sums, group, length):
    """Write the gradient of a row from that of its filtered tokens [R, G, 8]; return the sums of those of its taps."""
    _, g1, g2, g3, g4, g5, g6, g7 = tiles.eight(grad)
    one_later = tiles.joined(g1, g2, g3, g4, g5, g6, g7, later0)
    two_later = tiles.joined(g2, g3, g4, g5, g6, g7, later0, later1)
    at = group[:, :, None] + tl.arange(0, 8)[None, None, :]
    grad_row = tiles.filtered((grad, one_later, two_later), taps)
    tl.store(row_ptr + at, grad_row.to(row_ptr.dtype.element_ty), mask=at < length)
    return (
        sums[0] + _in_threads(grad * delays[2]),
        sums[1] + _in_threads(grad * delays[1]),
        sums[2] + _in_threads(grad * delays[0]),
    )


@triton.jit
def _through_gates(
    x_ptr, stride, history_ptr, taps_ptr, grad_y_ptr, grad_x_ptr, grad_stride, first, length, sums, later,
    HISTORY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Replace what the scan left of a tile in the rows of the gradient by that gradient.

    It left its output y in the first row, for the gate behind it, and the gradient of its input in the second. They are
    read before anything is written, as [R, G, 8] like everything here: the shifts stay inside of threads.
    `later` are the first two of both in the tile to the right, which by now holds its gradients.
    """
    group = first + tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK // 8)[None, :] * 8
    end = tl.minimum(length, first + ROWS * CHUNK)
    y, y0, y1 = _load_ahead(grad_x_ptr, group, end)
    d, d0, d1 = _load_ahead(grad_x_ptr + grad_stride, group, end)
    starts = (
        tl.load(grad_x_ptr + first).to(tl.float32),
        tl.load(grad_x_ptr + first + 1, mask=first + 1 < length, other=0.0).to(tl.float32),
        tl.load(grad_x_ptr + grad_stride + first).to(tl.float32),
        tl.load(grad_x_ptr + grad_stride + first + 1, mask=first + 1 < length, other=0.0).to(tl.float32),
    )
    tl.debug_barrier()
    last = group + 8 == first + ROWS * CHUNK
    y0, y1 = tl.where(last, later[0], y0), tl.where(last, later[1], y1)
    d0, d1 = tl.where(last, later[2], d0), tl.where(last, later[3], d1)
    g, g0, g1 = _load_ahead(grad_y_ptr, group, length)
    delays = tiles.load_delayed(x_ptr, history_ptr, first, length, HISTORY, ROWS, CHUNK)
    post_sums = _through_filter(
        grad_x_ptr, g * y, g0 * y0, g1 * y1, delays, tiles.load_taps(taps_ptr), sums[0], group, length
    )
    taps = tiles.load_taps(taps_ptr + 6)
    values = tiles.load_delayed(x_ptr + 2 * stride, history_ptr + 4, first, length, HISTORY, ROWS, CHUNK)
    _, x0, x1 = _load_ahead(x_ptr + 2 * stride, group, length)
    value = tiles.filtered(values, taps)
    value0, value1 = _filter_ahead(values[0], x0, x1, taps)
    taps = tiles.load_taps(taps_ptr + 3)
    delays = tiles.load_delayed(x_ptr + stride, history_ptr + 2, first, length, HISTORY, ROWS, CHUNK)
    pre_sums = _through_filter(
        grad_x_ptr + grad_stride, d * value, d0 * value0, d1 * value1, delays, taps, sums[1], group, length
    )
    _, x0, x1 = _load_ahead(x_ptr + stride, group, length)
    pre = tiles.filtered(delays, taps)
    pre0, pre1 = _filter_ahead(delays[0], x0, x1, taps)
    taps = tiles.load_taps(taps_ptr + 6)
    value_sums = _through_filter(
        grad_x_ptr + 2 * grad_stride, d * pre, d0 * pre0, d1 * pre1, values, taps, sums[2], group, length
    )
    return (post_sums, pre_sums, value_sums), starts


@triton.jit
def _store_taps(grad_taps_ptr, sums):
    tl.store(grad_taps_ptr, tl.sum(sums[0]))
    tl.store(grad_taps_ptr + 1, tl.sum(sums[1]))
    tl.store(grad_taps_ptr + 2, tl.sum(sums[2]))


@triton.jit
def _store_history(grad_history_ptr, gate, first, second, taps_ptr, CHUNK: tl.constexpr):
    """Write the gradients of the two inputs before a row; its first filtered tokens' are gate [1, C] times these."""
    at = tl.arange(0, CHUNK)[None, :]
    first *= tl.sum(tl.where(at == 0, gate, 0.0))
    second *= tl.sum(tl.where(at == 1, gate, 0.0))
    taps = tiles.load_taps(taps_ptr)
    kind = grad_history_ptr.dtype.element_ty
    tl.store(grad_history_ptr, (taps[0] * first).to(kind))
    tl.store(grad_history_ptr + 1, (taps[1] * first + taps[0] * second).to(kind))


@triton.jit
def backward_kernel(
    x_ptr, history_ptr, taps_ptr, skip_ptr, log_poles_ptr, residues_ptr, carry_ptr, lengths_ptr, grad_y_ptr,
    grad_final_ptr, grad_x_ptr, grad_history_ptr, grad_taps_ptr, grad_skip_ptr, grad_log_poles_ptr, grad_residues_ptr,
    grad_state_ptr, channels, length, real, poles, x_batch_stride, x_row_stride, grad_y_batch_stride,
    grad_y_row_stride, grad_x_batch_stride, grad_x_row_stride, KEEP: tl.constexpr,
    GATED: tl.constexpr, HISTORY: tl.constexpr, FINAL: tl.constexpr, LENGTHS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, POLES: tl.constexpr,
):  # fmt: skip
    """Write one channel's gradients: of its row(s), and this batch row's share of those of its parameters."""
    program = tl.program_id(0).to(tl.int64)
    batch, channel = program // channels, program % channels
    pole = tl.arange(0, POLES)
    row = tl.arange(0, ROWS)
    log_poles = tl.load(log_poles_ptr + channel * poles + pole, mask=pole < poles, other=-1.0)
    residues = tl.load(residues_ptr + channel * poles + pole, mask=pole < poles, other=0.0)
    inner = tiles.toeplitz(log_poles, residues, CHUNK).to(OPERAND)
    into = tiles.to_state(log_poles, CHUNK)
    into_high = into.to(OPERAND)
    out_high, out_low = tiles.two_parts(tiles.from_state(log_poles, residues, CHUNK), OPERAND)
    num_tiles = tl.cdiv(length, ROWS * CHUNK)
    x_ptr += batch * x_batch_stride + channel * (3 * x_row_stride if GATED else x_row_stride)
    grad_x_ptr += batch * grad_x_batch_stride + channel * (3 * grad_x_row_stride if GATED else grad_x_row_stride)
    grad_y_ptr += batch * grad_y_batch_stride + channel * grad_y_row_stride
    history_ptr += program * 6
    taps_ptr += channel * 9
    adjoint = tl.zeros((POLES,), dtype=tl.float32)
    grad_inner = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    grad_into = tl.zeros((CHUNK, POLES), dtype=tl.float32)
    grad_out_of = tl.zeros((POLES, CHUNK), dtype=tl.float32)
    grad_decay = tl.zeros((ROWS, POLES), dtype=tl.float32)
    if GATED:
        skip = tl.load(skip_ptr + channel).to(tl.float32)
        nothing = tl.zeros((ROWS // 2, CHUNK // 8), dtype=tl.float32)
        sums = ((nothing, nothing, nothing), (nothing, nothing, nothing), (nothing, nothing, nothing))
        later = (0.0, 0.0, 0.0, 0.0)
    for step in range(num_tiles):
        tile = num_tiles - 1 - step
        first = tile * ROWS * CHUNK
        # Read anew for every tile, like the taps: what follows from them would fill registers through the loop.
        log_poles = tl.load(log_poles_ptr + channel * poles + pole, mask=pole < poles, other=-1.0)
        grad_y = tiles.load_tokens(grad_y_ptr, first, length, ROWS, CHUNK)
        if GATED:
            tokens = tiles.load_gated(
                x_ptr, x_row_stride, history_ptr, taps_ptr, first, length, HISTORY, ROWS, CHUNK
            ).to(OPERAND)
            post = tiles.load_filtered(x_ptr, history_ptr, taps_ptr, first, length, HISTORY, ROWS, CHUNK)
            grad = (grad_y.to(tl.float32) * post).to(OPERAND)
        else:
            tokens = tiles.load_tokens(x_ptr, first, length, ROWS, CHUNK).to(OPERAND)
            grad = grad_y.to(OPERAND)
        at_tile = (program * tl.cdiv(length, KEEP) + first // KEEP) * poles
        state = tl.load(carry_ptr + at_tile + pole, mask=pole < poles, other=0.0)
        added = tl.dot(tokens, into_high, input_precision=PRECISION)
        states = tiles.accumulate(added, log_poles * CHUNK, False)
        states = tiles.row_before(states, 0.0, ROWS)
        states += tl.exp((row * CHUNK)[:, None] * log_poles[None, :]) * state[None, :]
        if GATED:
            y = tl.dot(tokens, inner, input_precision=PRECISION)
            y = tl.dot(states.to(OPERAND), out_high, y, input_precision=PRECISION)
            tiles.store_tokens(grad_x_ptr, y + skip * tokens.to(tl.float32), first, length, ROWS, CHUNK)
        # Next to the rounding of filters and gates, that of 16-bit operands is small; without those, it is not.
        direct = tl.dot(grad, tl.trans(out_high), input_precision=PRECISION)
        if not GATED and tl.float32 != OPERAND:
            direct = tl.dot(grad, tl.trans(out_low), direct, input_precision=PRECISION)
        if FINAL:
            end = tl.load(lengths_ptr + batch).to(tl.int32) if LENGTHS else real
            last_chunk = tl.maximum(end - 1, 0) // CHUNK
            if last_chunk // ROWS == tile:
                is_last = (row == last_chunk % ROWS)[:, None]
                grad_final = tl.load(grad_final_ptr + program * poles + pole, mask=pole < poles, other=0.0)
                grad_final *= tl.exp((end - last_chunk * CHUNK) * log_poles)
                direct += tl.where(is_last, grad_final[None, :], 0.0)
        before = tiles.accumulate(direct, log_poles * CHUNK, True)
        after = tiles.row_after(before, 0.0, ROWS)
        after += tl.exp(((ROWS - 1 - row) * CHUNK)[:, None] * log_poles[None, :]) * adjoint[None, :]
        top = tl.sum(tl.where((row == 0)[:, None], before, 0.0), axis=0)
        adjoint = tl.exp(ROWS * CHUNK * log_poles) * adjoint + top
        grad_inner = tl.dot(tl.trans(tokens), grad, grad_inner, input_precision=PRECISION)
        grad_into = tl.dot(tl.trans(tokens), after.to(OPERAND), grad_into, input_precision=PRECISION)
        grad_out_of = tl.dot(tl.trans(states.to(OPERAND)), grad, grad_out_of, input_precision=PRECISION)
        grad_decay += states * after
        grad_x = tl.dot(grad, tl.trans(inner), input_precision=PRECISION)
        if GATED:
            grad_x = tl.dot(after.to(OPERAND), tl.trans(into_high), grad_x, input_precision=PRECISION)
        else:
            grad_x = tl.dot(after, tl.trans(into), grad_x, input_precision=PRECISION)
        if FINAL:  # noqa: SIM102  (known when compiled, and false where `last_chunk` is not known)
            if last_chunk // ROWS == tile:
                grad_final = tl.load(grad_final_ptr + program * poles + pole, mask=pole < poles, other=0.0)
                tail = tl.sum(tiles.ahead(log_poles, end - last_chunk * CHUNK, CHUNK) * grad_final[None, :], axis=1)
                grad_x += tl.where((row == last_chunk % ROWS)[:, None], tail[None, :], 0.0)
        if GATED:
            grad_x += skip * grad.to(tl.float32)
            tiles.store_tokens(grad_x_ptr + grad_x_row_stride, grad_x, first, length, ROWS, CHUNK)
            tl.debug_barrier()
            sums, later = _through_gates(
                x_ptr, x_row_stride, history_ptr, taps_ptr, grad_y_ptr, grad_x_ptr, grad_x_row_stride,
                first, length, sums, later, HISTORY, ROWS, CHUNK,
            )  # fmt: skip
        else:
            tiles.store_tokens(grad_x_ptr, grad_x, first, length, ROWS, CHUNK)
    log_poles = tl.load(log_poles_ptr + channel * poles + pole, mask=pole < poles, other=-1.0)
    residues = tl.load(residues_ptr + channel * poles + pole, mask=pole < poles, other=0.0)
    lags = tiles.diagonals(grad_inner, CHUNK)
    grad_log_poles, grad_residues = tiles.parameter_gradients(
        log_poles, residues, lags, grad_into, grad_out_of, tl.sum(grad_decay, axis=0), CHUNK
    )
    at = program * poles + pole
    tl.store(grad_residues_ptr + at, grad_residues, mask=pole < poles)
    tl.store(grad_log_poles_ptr + at, grad_log_poles, mask=pole < poles)
    tl.store(grad_state_ptr + at, adjoint, mask=pole < poles)
    if GATED:
        tl.store(grad_skip_ptr + program, tl.sum(tl.where(tl.arange(0, CHUNK) == 0, lags, 0.0)))
        grad_taps_ptr += program * 9
        grad_history_ptr += program * 6
        _store_taps(grad_taps_ptr, sums[0])
        _store_taps(grad_taps_ptr + 3, sums[1])
        _store_taps(grad_taps_ptr + 6, sums[2])
        if HISTORY:
            gate = tiles.load_tokens(grad_y_ptr, 0, length, 1, CHUNK).to(tl.float32)
            _store_history(grad_history_ptr, gate, later[0], later[1], taps_ptr, CHUNK)
            gate = tiles.load_filtered(
                x_ptr + 2 * x_row_stride, history_ptr + 4, taps_ptr + 6, 0, length, True, 1, CHUNK
            )
            _store_history(grad_history_ptr + 2, gate, later[2], later[3], taps_ptr + 3, CHUNK)
            gate = tiles.load_filtered(x_ptr + x_row_stride, history_ptr + 2, taps_ptr + 3, 0, length, True, 1, CHUNK)
            _store_history(grad_history_ptr + 4, gate, later[2], later[3], taps_ptr + 6, CHUNK)
