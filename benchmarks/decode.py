"""Decoding on CPU: a token after short and long contexts, and a batch of mixed prompts against one by one."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.timing import interleaved
from cistron.inference.generate import Generation, generate
from cistron.models.evo2.cache import AttentionState, Cache, FirState
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2

CONTEXTS = (1_000, 10_000, 100_000)
STEPS = 20
CHUNK = 8_192
GROWTH_ASKED = 1.1
"""Constant, within what clocks on a quiet machine differ."""

PROMPT_LENGTHS = (3, 17, 40, 64, 100, 150, 220, 300)
NUM_TOKENS = 80
SPEEDUP_ASKED = 5.0
TOLERANCE = 1e-4


def run() -> list[dict[str, Any]]:
    """Return the rows; a wrong result is an error, not a row."""
    torch.set_num_threads(2)
    return [*_per_token(), _batch()]


def _model(pattern: str, width: int) -> Evo2:
    config = Evo2Config(
        hidden_size=width,
        layer_pattern=pattern,
        num_attention_heads=width // 64,
        mlp_size=width * 11 // 4,
        num_filter_groups=width // 16,
        max_length=2 * CONTEXTS[-1],
    )
    return Evo2(config, dtype=torch.float32).eval()


@torch.inference_mode()
def _per_token() -> list[dict[str, Any]]:
    """Step from states that were set up by reading contexts of different lengths in chunks."""
    model = _model("SDHSDH", 256)
    ids = _dna(CONTEXTS[-1])
    caches = {length: _read(model, ids[:, :length]) for length in CONTEXTS}
    token = _dna(1)
    for length, cache in caches.items():
        _check_step(model, cache, token, length)
    seconds = interleaved({str(n): lambda c=cache: _steps(model, c, token) for n, cache in caches.items()}, rounds=9)
    base = seconds[str(CONTEXTS[0])]
    return [
        {
            "what": f"Hyena layers, a token after {length:,}",
            "measured": f"{1000 * seconds[str(length)] / STEPS:.2f} ms, state {_bytes(cache) / 1e6:.2f} MB",
            "ratio": round(seconds[str(length)] / base, 3),
            "asked": f"time at most {GROWTH_ASKED} x the first, memory equal",
            "met": seconds[str(length)] / base <= GROWTH_ASKED and _bytes(cache) == _bytes(caches[CONTEXTS[0]]),
        }
        for length, cache in caches.items()
    ]


def _batch() -> dict[str, Any]:
    """Generate from mixed prompts together and one after another."""
    model = _model("SDH*SDH*", 512)
    prompts = [bytes(_dna(length, seed=length)[0].tolist()).decode() for length in PROMPT_LENGTHS]

    def together() -> list[Generation]:
        return generate(model, prompts, num_tokens=NUM_TOKENS, seed=0)

    def one_by_one() -> list[Generation]:
        return [generate(model, [prompt], num_tokens=NUM_TOKENS, seed=0)[0] for prompt in prompts]

    for a, b in zip(together(), one_by_one(), strict=True):
        close = all(math.isclose(x, y, abs_tol=TOLERANCE) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        if a.text != b.text or not close:
            raise AssertionError("a prompt's continuation depends on its batch: no speed is reported")
    seconds = interleaved({"together": together, "one_by_one": one_by_one}, rounds=3)
    tokens = len(prompts) * NUM_TOKENS
    ratio = seconds["one_by_one"] / seconds["together"]
    return {
        "what": f"{len(prompts)} prompts of {PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[-1]} nt, {NUM_TOKENS} tokens each",
        "measured": f"{tokens / seconds['together']:.0f} against {tokens / seconds['one_by_one']:.0f} tokens/s",
        "ratio": round(ratio, 2),
        "asked": f"at least {SPEEDUP_ASKED:.0f} x one after another",
        "met": ratio >= SPEEDUP_ASKED,
    }


def _read(model: Evo2, ids: torch.Tensor) -> Cache:
    cache = model.new_cache(1)
    for part in ids.split(CHUNK, dim=1):
        model(part, cache=cache)
    return cache


def _steps(model: Evo2, cache: Cache, token: torch.Tensor) -> None:
    for _ in range(STEPS):
        model(token, cache=cache)


def _check_step(model: Evo2, cache: Cache, token: torch.Tensor, length: int) -> None:
    """Compare a step with the same two tokens as a chunk, which takes the convolution's path."""
    ahead, beside = cache.select([0]), cache.select([0])
    chunk = model(token.expand(1, 2), cache=ahead).logits
    steps = torch.cat([model(token, cache=beside).logits for _ in range(2)], dim=1)
    difference = (chunk - steps).abs().max().item()
    if not difference < TOLERANCE:
        raise AssertionError(f"after {length} tokens a step differs from the chunk by {difference:.1e}: no speed")


def _bytes(cache: Cache) -> int:
    """Return the size of everything that the cache remembers."""
    total = 0
    for layer in cache.layers:
        assert not isinstance(layer, AttentionState)
        for state in (layer.projection, layer.operator):
            tensor = state.inputs if isinstance(state, FirState) else state
            total += tensor.numel() * tensor.element_size()
    return total


def _dna(length: int, *, seed: int = 0) -> torch.Tensor:
    """Return random ids [1, L]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(list(b"ACGT"))[torch.randint(4, (1, length), generator=generator)]
