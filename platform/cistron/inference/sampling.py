"""From logits to the next token, reproducibly.

Everything happens on the CPU in fp64 (a row is 512 numbers), and each prompt draws from its own generator, so a seed
gives the same text on any device, alone or beside other prompts.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from cistron.errors import InputError

_SEED_BITS = 63
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: choose among the k most likely tokens; 1 is greedy, 0 means all.
        top_p: choose among the most likely tokens that together reach this probability; 1 means all.
        allowed_ids: the only ids that may be chosen; None means all.
    """

    temperature: float = 1.0
    top_k: int = 4
    top_p: float = 1.0
    allowed_ids: tuple[int, ...] | None = None

    def validated(self, *, vocab_size: int) -> Sampling:
        """Return this, or raise ``InputError`` that names the setting, what was got and what is allowed."""
        temperature, top_k, top_p, ids = self.temperature, self.top_k, self.top_p, self.allowed_ids or ()
        if not (isinstance(temperature, Real) and temperature > 0 and math.isfinite(temperature)):
            raise InputError(f"temperature must be above 0, got {temperature}; greedy decoding is top_k=1")
        if not (isinstance(top_k, Integral) and 0 <= top_k <= vocab_size):
            raise InputError(f"top_k must be from 0 (all) to the vocabulary's {vocab_size}, got {top_k}")
        if not (isinstance(top_p, Real) and 0 < top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1 (all), got {top_p}")
        if any(token >= vocab_size for token in ids):
            raise InputError(f"allowed: {chr(max(ids))!r} is not among the model's {vocab_size} tokens")
        return self


def letter_ids(allowed: str | None) -> tuple[int, ...] | None:
    """Return the byte ids of the allowed letters, or None for no restriction.

    Raises:
        InputError: no letters, or one that is not a single byte.
    """
    if allowed is None:
        return None
    if not allowed:
        raise InputError("allowed must name at least one letter; None allows every token")
    for letter in allowed:
        if len(letter) != 1 or ord(letter) > 255:
            raise InputError(f"allowed: {letter!r} is not a single byte, so the model has no token for it")
    return tuple(sorted({ord(letter) for letter in allowed}))


def sample(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: [B, V].
        uniforms: [B] fp64 in [0, 1): each row's random number; greedy decoding ignores it.
        sampling: which tokens may be chosen, and how.

    Returns:
        int64 [B].
    """
    ids = None if sampling.allowed_ids is None else torch.tensor(sampling.allowed_ids)
    candidates = logits.double() if ids is None else logits[:, ids].double()
    ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
    order = order if ids is None else ids[order]
    if sampling.top_k == 1:
        return order[:, 0]
    if sampling.top_k:
        ranked = ranked[:, : sampling.top_k]
    # The largest logit is subtracted first, so that a tiny temperature cannot overflow.
    probabilities = ((ranked - ranked[:, :1]) / sampling.temperature).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    # Rounding could push the draw past the last token that may be chosen.
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(drawn, last))[:, 0]


class UniformStream:
    """Random numbers of one prompt, drawn ahead in blocks of a fixed size: a call per token would cost more."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._drawn: Iterator[float] = iter(())

    def next(self) -> float:
        """Return the next number in [0, 1)."""
        value = next(self._drawn, None)
        if value is None:
            self._drawn = iter(torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64).tolist())
            value = next(self._drawn)
        return value


def generators(prompts: Sequence[str], seed: int | Sequence[int] | None) -> list[torch.Generator]:
    """Return one random stream per prompt.

    A single seed gives a prompt the same stream whatever else is in the request; only repeats of one prompt differ from
    each other, so asking for a prompt n times gives n samples.

    Raises:
        InputError: a list of seeds of another length than the prompts, or a negative seed.
    """
    if seed is not None and not isinstance(seed, Integral | Iterable):
        raise InputError(f"seed must be a whole number, or one per prompt, got {seed!r}")
    if isinstance(seed, Integral):
        seeds = list(prompt_seeds(prompts, int(seed)))
    else:
        seeds = [secrets.randbits(_SEED_BITS) for _ in prompts] if seed is None else list(seed)
    if len(seeds) != len(prompts):
        raise InputError(f"got {len(seeds)} seeds for {len(prompts)} prompts; give one seed, or one per prompt")
    for value in seeds:
        if not isinstance(value, Integral) or not 0 <= value < 1 << 64:
            raise InputError(f"seed must be from 0 to 2^64 - 1, got {value!r}")
    return [torch.Generator().manual_seed(int(value)) for value in seeds]


def prompt_seeds(prompts: Iterable[str], seed: int) -> Iterator[int]:
    """Yield each prompt's own seed: `seed` at its first occurrence, one more at each further one."""
    seen: Counter[int] = Counter()
    for prompt in prompts:
        key = hash(prompt)  # A file of prompts is not kept in memory.
        yield seed + seen[key]
        seen[key] += 1
