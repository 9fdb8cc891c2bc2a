"""Floating-point operations of a training step, counted as what a fused implementation does.

Per token, twice the multiply-adds of each product, and the elementwise work beside it; attention counts what is
visible. The scan of HCL counts its chunked form, so the number is what the arithmetic units really get, where the
models' own ``flops_per_token`` counts the FFT that published throughputs count.
"""

from __future__ import annotations

from typing import Final

from benchmarks.gpu.cases.hyena import CHUNK, HCM_TAPS, POLES
from cistron.models.esm2.config import Esm2Config
from cistron.models.evo2.config import ATTENTION, HCL, HCM, HCS, Evo2Config

MASKED_SHARE: Final = 0.15


def evo2_flops(config: Evo2Config, length: int) -> tuple[float, float]:
    """Return forward and backward FLOPs of one token in a context of `length`."""
    width, inner, layers = config.hidden_size, config.mlp_size, config.num_layers
    short, medium, long, attention = (config.count(symbol) for symbol in (HCS, HCM, HCL, ATTENTION))
    products = (8 * width**2 + 6 * width * inner) * layers
    head = 2 * width * config.vocab_size
    rotary = 6 * width * attention
    forward = (
        products
        + (2 * inner + 10 * width) * layers
        + 35 * width * short
        + (21 + 4 * HCM_TAPS) * width * medium
        + (21 + 2 * CHUNK + 4 * POLES + 8 * POLES / CHUNK) * width * long
        + rotary
        + 2 * length * width * attention
        + head
    )
    backward = (
        2 * products
        + (4 * inner + 20 * width) * layers
        + 70 * width * short
        + (70 + 12 * HCM_TAPS) * width * medium
        + (70 + 6 * CHUNK + 12 * POLES) * width * long
        + rotary
        + 5 * length * width * attention
        + 2 * head
    )
    return float(forward), float(backward)


def esm2_flops(config: Esm2Config, length: float) -> tuple[float, float]:
    """Return forward and backward FLOPs of one token that attends to `length`; the head counts masked tokens only."""
    width, inner = config.hidden_size, config.intermediate_size
    products = 8 * width**2 + 4 * width * inner
    forward = products + 4 * length * width + 8 * inner + 24 * width + 6 * width
    backward = 2 * products + 10 * length * width + 12 * inner + 48 * width + 6 * width
    head = MASKED_SHARE * (2 * width**2 + 2 * width * config.vocab_size)
    return config.num_layers * forward + head, config.num_layers * backward + 2 * head
