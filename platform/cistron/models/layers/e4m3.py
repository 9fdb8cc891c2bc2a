"""FP8 arithmetic on any device: rounding to E4M3, and two models of how hardware sums the products.

E4M3 has 4 bits of significand, exponents -6 .. 8 and subnormals down to 2^-9; there is no infinity, the largest number
is 448. The product of two such numbers is exact in fp32, so only the order and the width of the sum can differ between
machines. ``product_in_fp32`` sums in fp32. ``product_as_hopper`` follows the published models of the FP8 instructions
of compute capability 9.0, each found by experiments on the hardware and reported bit-exact by its authors:
Xie et al. 2025 (arXiv:2511.10909, MMA-Sim) and Khattak and Mikaitis 2025 (arXiv:2512.07004).

What was compared: the rounding with a bitwise definition, both products with scalar simulations in exact arithmetic,
and ``product_as_hopper``, bit for bit, with the Hopper model of MMA-Sim 2.1.1 (m64n8k32 chained over K, random and
adverse operands). What was not: nothing in this file has been compared with an FP8 unit. A library that splits K
between thread blocks starts several chains, and then differs from the single chain that is assumed here.
"""

from __future__ import annotations

from typing import Final

import torch

E4M3: Final = torch.float8_e4m3fn
E4M3_MAX: Final = 448.0

_CHAINED: Final = 32
"""Products that one Hopper instruction adds to its accumulator."""
_FRACTION_BITS: Final = 13
"""Of the terms of that sum once they are aligned, and of the accumulator: E8M13 inside an fp32 register."""
_SMALLEST_EXPONENT: Final = -6
_EXPONENT_BASE_BITS: Final = 6
"""A sum of 32 powers of 2^6 is below the next power, so its exponent tells the largest of them."""

_FP32_BIAS: Final = 127
_FP32_FRACTION_BITS: Final = 23
_TILE_ON_CPU: Final = 1 << 16
_TILE_ON_GPU: Final = 1 << 24
"""Elements of a result that are computed together: what fits a cache, and what fills a GPU."""


def round_to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``x * scale`` in E4M3: the nearest number, ties to even, and 448 for all that is larger; NaN stays NaN.

    Args:
        x: any shape and floating-point dtype; the product with the scale is taken in fp32.
        scale: [] fp32.
    """
    return (x.float() * scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def product_in_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [T, K] times the transpose of weight [N, K], both E4M3, summed in fp32: [T, N] fp32."""
    return x.float() @ weight.float().t()


def product_as_hopper(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the same product as Hopper's tensor cores sum it in fast accumulation, without promotion to fp32.

    The accumulator takes up 32 products at a time. They and the accumulator are aligned to the largest exponent among
    them and cut, not rounded, below 2^-13 of it; their sum is exact and is cut to 13 fraction bits again. A product's
    exponent is the sum of its factors' exponents, with -6 for subnormals, as if nothing were normalised.

    Every sum that is formed here is one of integers below 2^24 in fp32, so no order of summation can change it.
    """
    x, weight = (_padded(operand.float()) for operand in (x, weight))
    rows = max(1, min(len(x), _tile_elements(x.device) // max(1, len(weight))))
    columns = max(1, _tile_elements(x.device) // rows)
    strips = [torch.cat([_chained(a, b) for b in torch.split(weight, columns)], dim=1) for a in torch.split(x, rows)]
    return torch.cat(strips)


def _tile_elements(device: torch.device) -> int:
    return _TILE_ON_CPU if device.type == "cpu" else _TILE_ON_GPU


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Fill K with zeros, which change no sum, to whole instructions."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % _CHAINED))


def _chained(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return one tile: x [t, K] and weight [n, K] as fp32 to [t, n]."""
    total = x.new_zeros(len(x), len(weight))
    for a, b in zip(torch.split(x, _CHAINED, dim=1), torch.split(weight, _CHAINED, dim=1), strict=True):
        exponent = torch.maximum(_largest_exponent(a, b), _exponent(total))
        total = _aligned_sum(total, a.t().contiguous(), b.t().contiguous(), _power_of_two(_FRACTION_BITS - exponent))
        total = _cut(total) * _power_of_two(exponent - _FRACTION_BITS)
    return total


def _aligned_sum(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sum the accumulator [t, n] and the 32 products of a [32, t] and b [32, n] in units of 1 / scale."""
    summed = (total * scale).trunc_()
    product = torch.empty_like(summed)
    for left, right in zip(a, b, strict=True):
        torch.mul(left[:, None], right[None, :], out=product)
        summed += product.mul_(scale).trunc_()
    return summed


def _largest_exponent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the largest exponent among the non-zero products of a [t, 32] and b [n, 32]: int32 [t, n].

    A matrix product of 2^(6 e) finds it without forming the products; where all are zero it is below any exponent.
    """
    powers = [
        torch.where(
            operand == 0,
            0.0,
            _power_of_two(_exponent(operand).clamp(min=_SMALLEST_EXPONENT) * _EXPONENT_BASE_BITS),
        )
        for operand in (a, b)
    ]
    return _exponent(powers[0] @ powers[1].t()) // _EXPONENT_BASE_BITS


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Return floor(log2 |x|) of normal fp32 numbers, and -127 of zero, as int32."""
    return (x.view(torch.int32) >> _FP32_FRACTION_BITS & 0xFF) - _FP32_BIAS


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent in fp32, exactly; ``exp2`` and ``ldexp`` are approximations on some devices."""
    return (exponent + _FP32_BIAS << _FP32_FRACTION_BITS).view(torch.float32)


def _cut(x: torch.Tensor) -> torch.Tensor:
    """Drop all but 13 fraction bits of fp32 numbers, towards zero."""
    return (x.view(torch.int32) & (-1 << _FP32_FRACTION_BITS - _FRACTION_BITS)).view(torch.float32)
