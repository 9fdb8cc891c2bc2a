"""The published initialisation of Evo 2, one tensor at a time.

Each tensor has a random stream of its own, keyed by the seed and its name, so its numbers depend neither on device and
dtype nor on the rest of the model. A filter is drawn in its training form in both parametrizations: with the same seed
they start as the same function.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import torch

from cistron.models.evo2.config import HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.hyena import decayed_taps, factored_log_poles

FRESH_P: Final = -1.0
"""Every p of a fresh HCL filter in training form."""
_GAMMA_RANGE: Final = (0.01, 0.1)
_RESIDUE_SCALE: Final = 0.1
_HCM_SCALE: Final = 1e-5
_DECAY_EXPONENTS: Final = (-2, 2)
"""Decimal exponents of HCM's decay rates, from the first group to the last."""


def initial_tensor(config: Evo2Config, name: str, shape: torch.Size, *, seed: int) -> torch.Tensor:
    """Return the first value of the parameter or buffer `name`, fp32 on the CPU."""
    *path, leaf = name.split(".")
    if leaf == "inv_freq":
        return rotary_frequencies(config)
    if leaf in ("input_scale", "weight_scale"):
        return torch.ones(shape, device="cpu")
    if leaf == "bias" or leaf == "weight":
        return _dense(config, name, shape, seed)
    if leaf == "projection_taps":
        return _uniform(shape, config.short_filter_length, _stream(seed, name))
    return _filter(config, config.layer_pattern[int(path[1])], ".".join(path), leaf, shape, seed)


def rotary_frequencies(config: Evo2Config) -> torch.Tensor:
    """Return the rotary frequencies rounded to bf16 as the published checkpoints hold them, [D/2] fp32."""
    return exact_rotary_frequencies(config).bfloat16().float()


def exact_rotary_frequencies(config: Evo2Config) -> torch.Tensor:
    """Return base^(-2i/D) for i = 0 .. D/2 - 1, [D/2] fp32."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    return 1.0 / config.rotary_base**exponents


def hcm_decay(config: Evo2Config) -> torch.Tensor:
    """Return [G, K] fp32: each group's exponential decay, over taps that are a small part of the cached length."""
    first, last = _DECAY_EXPONENTS
    rates = torch.logspace(first, last, config.num_filter_groups, device="cpu")
    times = torch.linspace(0, 1, config.filter_cache_length, device="cpu")[: config.hcm_filter_length]
    return (-rates[:, None] * times).exp()


def _dense(config: Evo2Config, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Biases 0, norms 1, matrices normal, narrower where they write to the residual stream."""
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu")
    if name.endswith("norm.weight"):
        return torch.ones(shape, device="cpu")
    if name == "embedding.weight" and config.embedding_init_std is not None:
        return _normal(shape, _stream(seed, name)) * config.embedding_init_std
    width = config.hidden_size
    writes = name.endswith("output.weight")
    deviation = 2 / (config.num_layers * math.sqrt(width)) if writes else math.sqrt(2 / (5 * width))
    return _normal(shape, _stream(seed, name)) * deviation


def _filter(config: Evo2Config, symbol: str, module: str, leaf: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return a tensor of an operator's filter; `module` is the filter's own name."""
    stream = _stream(seed, f"{module}.{leaf}")
    if leaf == "skip":
        reach = {HCS: config.hcs_filter_length, HCM: config.hcm_filter_length, HCL: config.filter_cache_length}
        return _uniform(shape, reach[symbol], stream)
    if leaf == "taps" and symbol == HCS:
        # savanna bounds this filter by the short projection filter's length, not by its own.
        return _uniform(shape, config.short_filter_length, stream)
    if leaf == "taps":
        taps = _normal(shape, stream) * (_HCM_SCALE / math.sqrt(config.filter_cache_length))
        return taps if config.parametrization == "training" else decayed_taps(taps, hcm_decay(config))
    if leaf == "decay":
        return hcm_decay(config)
    if leaf == "residues":
        return _normal(shape, stream) * (_RESIDUE_SCALE / math.sqrt(config.state_size))
    return _poles(leaf, module, shape, seed)


def _poles(leaf: str, module: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return gamma, p, or the log poles that they make."""
    p = torch.full(shape, FRESH_P, device="cpu")
    if leaf == "p":
        return p
    gamma = torch.empty(shape, device="cpu").uniform_(*_GAMMA_RANGE, generator=_stream(seed, f"{module}.gamma")).log()
    return gamma if leaf == "gamma" else factored_log_poles(gamma, p)


def _normal(shape: torch.Size, stream: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device="cpu").normal_(generator=stream)


def _uniform(shape: torch.Size, taps: int, stream: torch.Generator) -> torch.Tensor:
    """Draw between plus and minus 1/sqrt(taps)."""
    return torch.empty(shape, device="cpu").uniform_(-(taps**-0.5), taps**-0.5, generator=stream)


def _stream(seed: int, name: str) -> torch.Generator:
    """Return the random stream of one tensor."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
