"""Log-likelihoods of sequences that begin alike: a causal model reads each shared beginning once.

Sorted, sequences with a common beginning are neighbours, and the lengths of the neighbours' common prefixes are a
tree: its inner segments are shared, its leaves are each sequence's own end. Every segment is run once, from the state
that its parent left, which is forked for each child. Which sequences are asked together never changes a score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cistron.inference.batching import TOKEN_BUDGET, length_sorted_batches, padded
from cistron.inference.chunked import forward_chunks
from cistron.inference.finite import without_nan
from cistron.models.evo2.cache import Cache
from cistron.models.evo2.model import Evo2

LEAST_SHARED: Final = 32
"""Tokens below which forking a state costs more than reading them again."""
_MOST_FORKS: Final = 128
"""Segments between a sequence's beginning and its end: bounds the passes, and the depth of the tree."""


@dataclass(slots=True)
class Segment:
    """Tokens [start, stop) of every sequence below it.

    Attributes:
        sequence: index of a sequence below; of a leaf, the one that ends here.
        start: place of its first token.
        stop: place behind its last token; a leaf may be empty, when its sequence is the beginning of another.
        reach: length of the longest sequence below.
        children: how the sequences go on; none for a leaf.
    """

    sequence: int
    start: int
    stop: int
    reach: int
    children: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the segment and those below it hold."""
        total, waiting = 0, [self]
        while waiting:
            segment = waiting.pop()
            total += segment.stop - segment.start
            waiting.extend(segment.children)
        return total


def shared_segments(sequences: Sequence[str], *, least_shared: int = LEAST_SHARED) -> list[Segment]:
    """Return the trees of distinct sequences; no two segments share `least_shared` tokens that are run twice."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    if not order:
        return []
    codes = [np.frombuffer(sequences[index].encode("latin-1"), dtype=np.uint8) for index in order]
    # commons[i] is what the i-th sequence in order shares with the one before it.
    commons = [0, *(_common_prefix(*pair) for pair in pairwise(codes))]
    lengths = [len(code) for code in codes]
    least = max(least_shared, max(lengths) // _MOST_FORKS)

    def split(first: int, last: int, depth: int) -> list[Segment]:
        """Return the segments that follow `depth` tokens common to the sequences [first, last) of the order."""
        cuts = [i for i in range(first + 1, last) if commons[i] < depth + least]
        return [grown(*bounds, depth) for bounds in zip([first, *cuts], [*cuts, last], strict=True)]

    def grown(first: int, last: int, depth: int) -> Segment:
        reach = max(lengths[first:last])
        if last - first == 1:
            return Segment(order[first], depth, reach, reach)
        fork = min(commons[first + 1 : last])
        return Segment(order[first], depth, fork, reach, split(first, last, fork))

    return split(0, len(order), 0)


@torch.inference_mode()
def shared_prefix_sums(
    model: Evo2, sequences: Sequence[str], *, token_budget: int = TOKEN_BUDGET, least_shared: int = LEAST_SHARED
) -> NDArray[np.float64]:
    """Return the summed log-likelihood of each sequence, given its first token.

    Args:
        model: in eval mode, on its device.
        sequences: distinct and validated.
        token_budget: most tokens of one forward pass, padding included.
        least_shared: shortest common beginning that is run apart.

    Raises:
        CapabilityError: the model returned NaN.
    """
    rows = [model.tokenizer.encode(sequence) for sequence in sequences]
    sums = np.zeros(len(rows))
    segments = shared_segments(sequences, least_shared=least_shared)
    waiting = list(_batches([(segment, 0) for segment in segments], None, token_budget))
    while waiting:
        batch = waiting.pop()
        state = _run(model, batch, rows, token_budget)
        totals = without_nan(state.totals.numpy())
        children = []
        for row, (segment, total) in enumerate(zip(batch.segments, totals.tolist(), strict=True)):
            if not segment.children:
                sums[segment.sequence] = total
            for child in segment.children:
                if child.start == child.stop:
                    sums[child.sequence] = total
                else:
                    children.append((child, row))
        # The last in is the first out: children come before other batches, so few states are alive at once.
        waiting.extend(_batches(children, state, token_budget))
    return sums


@dataclass(slots=True)
class _State:
    """Where a batch of rows stands.

    Attributes:
        cache: the model's; None when no row goes on.
        logits: [B, V], the prediction of each row's next token; None before the first.
        totals: [B] float64 on the CPU, because not every GPU has fp64; log-likelihood of each row's tokens.
    """

    cache: Cache | None
    logits: torch.Tensor | None
    totals: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments that run together; the i-th goes on from row `rows[i]` of `parent`, or begins if there is none."""

    segments: list[Segment]
    rows: list[int]
    parent: _State | None


def _batches(segments: Sequence[tuple[Segment, int]], parent: _State | None, token_budget: int) -> Iterator[_Batch]:
    """Yield batches of (segment, row of its parent): inner ones, then leaves, as only the former keep a state."""
    for is_inner in (True, False):
        chosen = [pair for pair in segments if bool(pair[0].children) is is_inner]
        lengths = [segment.stop - segment.start for segment, _ in chosen]
        for batch in length_sorted_batches(lengths, token_budget=token_budget):
            yield _Batch([chosen[i][0] for i in batch], [chosen[i][1] for i in batch], parent)


def _run(model: Evo2, batch: _Batch, rows: Sequence[NDArray[np.int64]], token_budget: int) -> _State:
    """Read the segments of a batch."""
    pieces = [rows[segment.sequence][segment.start : segment.stop] for segment in batch.segments]
    ids, mask = padded(pieces, pad_id=model.tokenizer.pad_id, device=model.device)
    state = _fork(model, batch)
    for start, output in forward_chunks(model, ids, mask, chunk=max(1, token_budget // len(ids)), cache=state.cache):
        part = slice(start, start + output.logits.shape[1])
        _advance(state, output.logits, ids[:, part], mask[:, part])
    return state


def _fork(model: Evo2, batch: _Batch) -> _State:
    """Return the state from which a batch goes on: a copy of rows of its parent's, or an empty one."""
    if batch.parent is None:
        reach = max(segment.reach for segment in batch.segments)
        is_inner = any(segment.children for segment in batch.segments)
        cache = model.new_cache(len(batch.segments), reserve=reach) if is_inner else None
        return _State(cache, None, torch.zeros(len(batch.segments), dtype=torch.float64))
    parent = batch.parent
    assert parent.cache is not None, "an inner segment keeps its state"
    assert parent.logits is not None, "an inner segment has read a token"
    rows = torch.tensor(batch.rows)
    on_device = rows.to(model.device)
    return _State(parent.cache.select(on_device), parent.logits[on_device], parent.totals[rows])


def _advance(state: _State, logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Add what the next tokens [B, L], real where `mask` is true, are worth; `logits` [B, L, V] follow them."""
    if state.logits is not None:
        state.totals = state.totals + _summed_log_probs(state.logits[:, None], ids[:, :1], mask[:, :1])
    targets, scored = functional.pad(ids[:, 1:], (0, 1)), functional.pad(mask[:, 1:], (0, 1))
    state.totals = state.totals + _summed_log_probs(logits, targets, scored)
    last = logits[torch.arange(len(ids), device=ids.device), mask.sum(dim=1).clamp(min=1) - 1]
    # A row that ended in an earlier piece keeps the prediction that it has.
    state.logits = last if state.logits is None else torch.where(mask[:, :1], last, state.logits)


def _summed_log_probs(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sums of log p(target) where `mask` is true, float64 [B] on the CPU; log-probabilities are fp32."""
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return -losses.view(targets.shape).masked_fill(~mask, 0).cpu().double().sum(dim=1)


def _common_prefix(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    """Return how many letters two sequences begin with alike."""
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if len(differ) else shorter
