"""Triton kernel of the rotary position embedding: queries and keys turn in one pass over memory.

The gradient is the rotation by minus the angle, so one kernel serves both directions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import on_device


@triton.jit
def _cos_sin(angle):
    """Return cosine and sine of fp32 angles of any size, to fp32 precision.

    The angle is brought to an eighth of a turn in fp64, where 1e7 radians leave 1e-9; then short series suffice.
    """
    quarters = angle.to(tl.float64) * 0.6366197723675814
    nearest = tl.floor(quarters + 0.5)
    x = ((quarters - nearest) * 1.5707963267948966).to(tl.float32)
    quadrant = nearest.to(tl.int64) & 3
    t = x * x
    sin = x * (1.0 + t * (-1.6666667e-1 + t * (8.3333333e-3 + t * (-1.9841270e-4 + t * 2.7557319e-6))))
    cos = 1.0 + t * (-0.5 + t * (4.1666667e-2 + t * (-1.3888889e-3 + t * (2.4801587e-5 - t * 2.7557319e-7))))
    odd = (quadrant & 1) == 1
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    turned_cos = tl.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return turned_cos, tl.where(quadrant >= 2, -turned_sin, turned_sin)


@triton.jit
def _turn(x_ptr, y_ptr, at, to, inside, cos, sin, HALF: tl.constexpr):
    """Rotate one tile [TOKENS, HEADS, COLUMNS] of pairs of channels."""
    first = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + to, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + to + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, rotated_q_ptr, rotated_k_ptr, cos_ptr, sin_ptr, positions_ptr, inv_freq_ptr,
    tokens, length, heads, scaling,
    q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch, angle_token,
    PAIR: tl.constexpr, TABLES: tl.constexpr, INVERSE: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rotate TOKENS tokens of HEADS heads of q [tokens, heads, 2 HALF], and of k where PAIR.

    The angles come from TABLES of cosines and sines, or from positions and frequencies.
    """
    blocks = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    row, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    here = (token < tokens)[:, None] & (column < HALF)[None, :]
    at = row * angle_batch + place * angle_token
    if TABLES:
        cos = tl.load(cos_ptr + at[:, None] + column[None, :], mask=here, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at[:, None] + column[None, :], mask=here, other=0.0).to(tl.float32)
    else:
        position = tl.load(positions_ptr + at, mask=token < tokens, other=0).to(tl.float32)
        inv_freq = tl.load(inv_freq_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)
        cos, sin = _cos_sin(tl.div_rn(position, scaling)[:, None] * inv_freq[None, :])
    if INVERSE:
        sin = -sin
    cos, sin = cos[:, None, :], sin[:, None, :]
    inside = here[:, None, :] & (head < heads)[None, :, None]
    to = (token.to(tl.int64)[:, None] * heads + head[None, :])[:, :, None] * (2 * HALF) + column[None, None, :]
    at = (row * q_batch + place * q_token)[:, None, None] + (head.to(tl.int64) * q_head)[None, :, None]
    _turn(q_ptr, rotated_q_ptr, at + column[None, None, :], to, inside, cos, sin, HALF)
    if PAIR:
        at = (row * k_batch + place * k_token)[:, None, None] + (head.to(tl.int64) * k_head)[None, :, None]
        _turn(k_ptr, rotated_k_ptr, at + column[None, None, :], to, inside, cos, sin, HALF)


@torch.library.custom_op("cistron::rotate", mutates_args=())
def rotate(heads: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> list[Tensor]:
    """Rotate one or two tensors of heads [..., L, A, D] by angles, or by minus them."""
    lead = heads[0].shape[:-2]
    tables = [table.squeeze(-2).expand(*lead, -1).reshape(-1, lead[-1], table.shape[-1]) for table in (cos, sin)]
    if tables[0].stride() != tables[1].stride() or tables[0].stride(-1) != 1:
        tables = [table.contiguous() for table in tables]
    return _launch(heads, (*tables, *tables), tables[0].stride()[:2], 1.0, TABLES=True, INVERSE=inverse)


@torch.library.custom_op("cistron::rope", mutates_args=())
def rope(heads: list[Tensor], positions: Tensor, inv_freq: Tensor, scaling: float, inverse: bool) -> list[Tensor]:
    """Rotate one or two tensors of heads [..., L, A, D] by the angles of their positions, or by minus them."""
    lead = heads[0].shape[:-2]
    positions, inv_freq = positions.expand(lead).reshape(-1, lead[-1]), inv_freq.contiguous()
    angles = (inv_freq, inv_freq, positions, inv_freq)
    return _launch(heads, angles, positions.stride(), scaling, TABLES=False, INVERSE=inverse)


def _launch(
    heads: list[Tensor], angles: tuple[Tensor, ...], angle_strides: tuple[int, ...], scaling: float, **constants: bool
) -> list[Tensor]:
    """Run the kernel on one or two tensors; `angles` are its four pointers of angles."""
    rotated = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads]
    length, count, size = heads[0].shape[-3:]
    rows = [x.reshape(-1, length, count, size) for x in heads]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows[0], rows[-1]))
    tile = _tile(count, size // 2, tables=constants["TABLES"])
    tokens = len(q) * length
    if q.numel():
        grid = (triton.cdiv(tokens, tile["TOKENS"]) * triton.cdiv(count, tile["HEADS"]),)
        with on_device(q):
            rotate_kernel[grid](
                q, k, rotated[0], rotated[-1], *angles, tokens, length, count, scaling,
                *q.stride()[:3], *k.stride()[:3], *angle_strides,
                PAIR=len(heads) == 2, HALF=size // 2, **constants, **tile,
            )  # fmt: skip
    return rotated


def _tile(count: int, half: int, *, tables: bool) -> dict[str, int]:
    """Return a tile of about 1,024 pairs: many heads, which share their angles, but few that are not there.

    Fewer threads have more pairs each, over which the work on an angle is spread.
    """
    columns = triton.next_power_of_2(half)
    heads = next((n for n in (16, 8, 4) if -count % n <= count // 15), triton.next_power_of_2(min(count, 4)))
    return {
        "TOKENS": max(1, 1024 // (columns * heads)),
        "HEADS": heads,
        "COLUMNS": columns,
        "num_warps": 4 if tables else 2,
    }


@rotate.register_fake
def _(heads: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in heads]


@rope.register_fake
def _(heads: list[Tensor], positions: Tensor, inv_freq: Tensor, scaling: float, inverse: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in heads]


def _keep(ctx, inputs, output):
    _, *ctx.options = inputs
    ctx.save_for_backward(*(ctx.options.pop(0) for _ in range(2)))


def _rotate_gradient(ctx, grads):
    cos, sin = ctx.saved_tensors
    return rotate(grads, cos, sin, not ctx.options[-1]), None, None, None


def _rope_gradient(ctx, grads):
    positions, inv_freq = ctx.saved_tensors
    scaling, inverse = ctx.options
    return rope(grads, positions, inv_freq, scaling, not inverse), None, None, None, None


rotate.register_autograd(_rotate_gradient, setup_context=_keep)
rope.register_autograd(_rope_gradient, setup_context=_keep)
