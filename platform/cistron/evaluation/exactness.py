"""Do a model's fast paths compute what its plain forward pass computes?

Each check runs random input through two paths that must agree and returns the largest difference of their logits. What
remains in fp32 is the order of summation: matrix libraries multiply a few rows (on common CPUs, fewer than four) with
other kernels than many, so a prompt alone and in a batch differ in the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch.nn.utils.rnn import pad_sequence

from cistron.errors import CapabilityError
from cistron.models.base import SequenceModel
from cistron.models.evo2.model import Evo2

CHUNKS: Final = (1, 7, 64, 1000)
"""Tokens per chunk; 1 is step by step."""
STATE_LIMIT: Final = 1e-4
BATCH_LIMIT: Final = 1e-5
HALF_PRECISION_LIMIT: Final = 0.1
"""For weights in half precision or FP8 projections: their rounding hides small errors, but a lost state shows."""

_MIXED_LENGTHS: Final = (1, 2, 3, 5, 8, 40, 130, 200)
_SHORT_PROMPTS: Final = range(1, 9)
_STEPS: Final = 16
_TAIL: Final = 32
_DNA: Final = b"ACGT"
_RESIDUES: Final = "LAGVSERTIDPKQNFYMHWC"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        name: what must equal what.
        measured: how far apart they are.
        limit: what `measured` may be.
        detail: what stands behind the number, for a reader.
        absolute: the difference before anything is divided by the size of what is compared.
    """

    name: str
    measured: float
    limit: float
    detail: str = ""
    absolute: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is small enough; NaN is not."""
        return self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return the check for a summary."""
        return asdict(self) | {"passed": self.passed}


@torch.inference_mode()
def exactness_battery(model: SequenceModel, *, length: int = 1100, seed: int = 0) -> Iterator[Check]:
    """Yield the checks of a model, as each is done.

    Differences of logits above 1 are counted in units of the largest logit, because rounding grows with what is
    rounded.

    Args:
        model: in eval mode, on its device.
        length: tokens of the long sequence of Evo 2's chunked checks; at most the model's context is used.
        seed: of the random sequences.

    Raises:
        CapabilityError: the model returns numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Evo2):
        yield from _state_checks(model, _random_dna(min(length, model.config.max_length), generator).to(model.device))
        yield from _batch_checks(model, generator)
    else:
        yield from _protein_checks(model, generator)


def _state_checks(model: Evo2, ids: torch.Tensor) -> Iterator[Check]:
    """Yield whether a sequence [1, L] in chunks of any size, and behind short prompts, is the whole sequence."""
    whole = _finite(model(ids).logits)
    for chunk in CHUNKS:
        name = "step by step = whole" if chunk == 1 else f"chunks of {chunk} = whole"
        yield _check(model, name, _through_cache(model, ids, chunk), whole, STATE_LIMIT)
    short = ids[:, : max(_SHORT_PROMPTS) + _STEPS]
    prompts = [prompt for prompt in _SHORT_PROMPTS if prompt < short.shape[1]]
    if not prompts:
        return
    continued = torch.stack([_prompt_then_steps(model, short, prompt)[0] for prompt in prompts])
    expected = whole[:, : short.shape[1]].expand_as(continued)
    name = f"prompts of 1 to {prompts[-1]} tokens, then steps = whole"
    yield _check(model, name, continued, expected, STATE_LIMIT)


def _batch_checks(model: Evo2, generator: torch.Generator) -> Iterator[Check]:
    """Yield whether rows are independent of what shares their batch, their packed row, or their prefix."""
    longest = max(1, model.config.max_length - _STEPS)
    prompts = [_random_dna(min(n, longest), generator)[0].to(model.device) for n in _MIXED_LENGTHS]
    ends = torch.cat([_random_dna(_STEPS, generator) for _ in prompts]).to(model.device)
    together = _continued(model, prompts, ends)
    alone = torch.cat([_continued(model, [p], ends[row : row + 1]) for row, p in enumerate(prompts)])
    yield _check(model, "batch of mixed lengths = one at a time, logits", together, alone, BATCH_LIMIT)
    log_probs = (together.log_softmax(-1), alone.log_softmax(-1))
    yield _check(model, "batch of mixed lengths = one at a time, log-probs", *log_probs, BATCH_LIMIT)

    offsets = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)
    packed = model(torch.cat(prompts), cu_seqlens=offsets).logits
    singles = torch.cat([model(p[None]).logits[0] for p in prompts])
    yield _check(model, "packed = one at a time", packed, singles, BATCH_LIMIT)

    prefix, tails = prompts[-1][None], torch.cat([_random_dna(_TAIL, generator) for _ in range(3)]).to(model.device)
    cache = model.new_cache(1)
    model(prefix, cache=cache)
    forked = model(tails, cache=cache.select([0, 0, 0])).logits
    independent = model(torch.cat([prefix.expand(3, -1), tails], dim=1)).logits[:, prefix.shape[1] :]
    yield _check(model, "fork of a shared prefix = independent", forked, independent, BATCH_LIMIT)


def _protein_checks(model: SequenceModel, generator: torch.Generator) -> Iterator[Check]:
    """Yield whether proteins are independent of padding and of what they are packed with."""
    rows = []
    for length in (1, 2, 30, 75):
        letters = torch.randint(len(_RESIDUES), (length,), generator=generator).tolist()
        encoded = model.tokenizer.encode("".join(_RESIDUES[i] for i in letters))
        rows.append(torch.from_numpy(encoded).to(model.device))
    singles = _finite(torch.cat([model(row[None]).logits[0] for row in rows]))
    ids = pad_sequence(rows, batch_first=True, padding_value=model.tokenizer.pad_id)
    mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor([[len(r)] for r in rows], device=ids.device)
    yield _check(model, "padded = one at a time", model(ids, attention_mask=mask).logits[mask], singles, BATCH_LIMIT)
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    packed = model(torch.cat(rows), cu_seqlens=offsets).logits
    yield _check(model, "packed = one at a time", packed, singles, BATCH_LIMIT)


def _continued(model: Evo2, prompts: list[torch.Tensor], ends: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, S+1, V] after each prompt [L] and after each token of its continuation [B, S]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=ends.device)
    ids = pad_sequence(prompts, batch_first=True, padding_value=model.tokenizer.pad_id)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    cache = model.new_cache(len(prompts))
    logits = model(ids, attention_mask=mask, cache=cache).logits
    last = logits[torch.arange(len(prompts), device=ids.device), lengths - 1]
    return torch.cat(
        [last[:, None], *(model(token, cache=cache).logits for token in torch.split(ends, 1, dim=1))], dim=1
    )


def _through_cache(model: Evo2, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    cache = model.new_cache(len(ids))
    return torch.cat([model(part, cache=cache).logits for part in torch.split(ids, chunk, dim=1)], dim=1)


def _prompt_then_steps(model: Evo2, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    cache = model.new_cache(len(ids))
    pieces = [model(ids[:, :prompt], cache=cache).logits]
    pieces += [model(token, cache=cache).logits for token in torch.split(ids[:, prompt:], 1, dim=1)]
    return torch.cat(pieces, dim=1)


def _random_dna(length: int, generator: torch.Generator) -> torch.Tensor:
    """Return ids [1, L]."""
    return torch.tensor(list(_DNA))[torch.randint(len(_DNA), (1, length), generator=generator)]


def _check(model: SequenceModel, name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> Check:
    actual, expected = actual.double(), expected.double()
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    weights = next(model.parameters()).dtype
    exact = weights in (torch.float32, torch.float64) and not model.precision_path.startswith(("fp8", "int8"))
    detail = f"{difference:.1e} of numbers up to {largest:.1f}"
    return Check(name, difference / max(1.0, largest), limit if exact else HALF_PRECISION_LIMIT, detail, difference)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    if not logits.isfinite().all():
        raise CapabilityError("the model returns numbers that are not finite: this precision does not suit its weights")
    return logits
