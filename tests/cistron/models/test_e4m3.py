from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from cistron.models.layers import e4m3
from cistron.models.layers.e4m3 import E4M3, product_as_hopper, product_in_fp32, round_to_e4m3

ONE = torch.ones(())
EVERY_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
SUBNORMAL_EXPONENT = -6


def decoded(code: int) -> float:
    """The number of an E4M3 code, from the definition: sign, 4 bits of exponent with bias 7, 3 of fraction."""
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -magnitude if code & 128 else magnitude


MAGNITUDES = np.array([decoded(code) for code in range(127)])


def nearest_codes(values: np.ndarray) -> np.ndarray:
    """Codes of the nearest magnitudes in double precision; of two equally near ones, the even code."""
    above = np.searchsorted(MAGNITUDES, values).clip(1, 126)
    to_below, to_above = values - MAGNITUDES[above - 1], MAGNITUDES[above] - values
    takes_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(takes_above, above, above - 1)


@pytest.mark.parametrize("scale", [1.0, 0.37, 3000.0])
def test_every_bf16_number_is_rounded_to_the_nearest(scale: float):
    factor = torch.tensor(scale)
    rounded = round_to_e4m3(EVERY_BF16, factor)
    assert rounded.dtype == E4M3
    scaled = (EVERY_BF16.float() * factor).double().numpy()
    known = ~np.isnan(scaled)
    codes = rounded.view(torch.uint8).numpy()
    assert (codes[known] & 127 == nearest_codes(np.abs(scaled[known]).clip(max=448))).all()
    assert (codes[known] >> 7 == np.signbit(scaled[known])).all()
    assert (codes[~known] & 127 == 127).all()


def split(x: float) -> tuple[Fraction, int]:
    """Significand and exponent of an E4M3 number, not normalised below 2^-6."""
    exponent = max(math.frexp(abs(x))[1] - 1, SUBNORMAL_EXPONENT) if x else SUBNORMAL_EXPONENT
    return Fraction(x) / Fraction(2) ** exponent, exponent


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(x / unit) * unit


def chained(x: list[float], weight: list[float]) -> Fraction:
    """One output of Hopper's fast accumulation, in exact arithmetic, a term at a time."""
    total = Fraction(0)
    for start in range(0, len(x), 32):
        terms = []
        for a, b in zip(x[start : start + 32], weight[start : start + 32], strict=True):
            (left, left_exponent), (right, right_exponent) = split(a), split(b)
            if left * right:
                terms.append((Fraction(a) * Fraction(b), left_exponent + right_exponent))
        if total:
            terms.append((total, math.frexp(float(abs(total)))[1] - 1))
        if not terms:
            continue
        unit = Fraction(2) ** (max(exponent for _, exponent in terms) - 13)
        total = sum((cut(term, unit) for term, _ in terms), Fraction(0))
        if total:
            total = cut(total, Fraction(2) ** (math.frexp(float(abs(total)))[1] - 1 - 13))
    return total


def operands(kind: str, seed: int, count: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length, generator=generator)
    if kind == "wide":
        x = x * (4 * torch.randn(count, length, generator=generator)).exp()
    elif kind == "subnormal":
        x = x * 2e-3
    elif kind == "sparse":
        x = x * (torch.rand(count, length, generator=generator) < 0.05) * 30
    elif kind == "cancelling":
        x = x * 100
        x[:, length // 2 :] = -x[:, : length - length // 2] if seed % 2 else x[:, : length - length // 2]
    return round_to_e4m3(x, ONE)


@pytest.mark.parametrize("kind", ["normal", "wide", "subnormal", "sparse", "cancelling"])
@pytest.mark.parametrize("length", [5, 32, 72])
def test_reduced_accumulation_is_the_scalar_simulation(kind: str, length: int):
    x, weight = operands(kind, 1, 4, length), operands(kind, 2, 6, length)
    expected = [[float(chained(a, b)) for b in weight.float().tolist()] for a in x.float().tolist()]
    assert product_as_hopper(x, weight).tolist() == expected


def test_reduced_accumulation_loses_what_fp32_keeps():
    x, weight = (round_to_e4m3(operands("normal", seed, 8, 512).float().abs(), ONE) for seed in (1, 2))
    exact = x.double() @ weight.double().T
    assert (product_in_fp32(x, weight) / exact - 1).abs().max() < 1e-6
    lost = 1 - product_as_hopper(x, weight) / exact
    # Cutting only ever loses: at most 2^-13 of the largest exponent for each of 33 terms in each of 16 instructions.
    assert lost.min() > 1e-4
    assert lost.max() < 16 * 33 * 2.0**-13


def test_a_small_product_vanishes_beside_a_large_one():
    x = torch.zeros(1, 33)
    x[0, :2], x[0, 32] = torch.tensor([16.0, 2.0**-8]), 2.0**-8
    weight = torch.ones(1, 33)
    # 2^-8 is below 2^(4 - 13) in no chain; 2^-9 is in each.
    for small, expected in ((2.0**-8, 16 + 2.0**-7), (2.0**-9, 16 + 2.0**-8)):
        x[0, 1] = x[0, 32] = small
        assert product_as_hopper(round_to_e4m3(x, ONE), round_to_e4m3(weight, ONE)).item() == expected
    x[0, 0] = 32.0
    assert product_as_hopper(round_to_e4m3(x, ONE), round_to_e4m3(weight, ONE)).item() == 32
    assert product_in_fp32(round_to_e4m3(x, ONE), round_to_e4m3(weight, ONE)).item() == 32 + 2.0**-8


@pytest.mark.parametrize("tile", [1, 7, 1 << 20])
def test_tiles_do_not_change_a_bit(tile: int, monkeypatch: pytest.MonkeyPatch):
    x, weight = operands("wide", 1, 5, 40), operands("wide", 2, 9, 40)
    expected = product_as_hopper(x, weight)
    monkeypatch.setattr(e4m3, "_TILE_ON_CPU", tile)
    assert torch.equal(product_as_hopper(x, weight), expected)


def test_a_row_with_nan_stays_nan_and_alone():
    x, weight = operands("normal", 1, 3, 40), operands("normal", 2, 4, 40)
    expected = product_as_hopper(x, weight)
    spoilt = x.float()
    spoilt[1, 3] = math.nan
    found = product_as_hopper(round_to_e4m3(spoilt, ONE), weight)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
