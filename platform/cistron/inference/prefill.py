"""Read prompts of any lengths into one cache.

Prompts of similar length are read together, a bounded number of tokens at a time; the caches of all groups then become
one. So a short prompt beside a long one costs what it costs alone, and a long list no more memory than a short one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.inference.batching import padded
from cistron.inference.chunked import forward_chunks
from cistron.models.evo2.cache import Cache
from cistron.models.evo2.model import Evo2

_MOST_PADDING: Final = 0.25
_SMALL_GROUP: Final = 512
"""Tokens, padding included, that are read together however much of them is padding: a pass costs more than they do."""

Prompt = NDArray[np.int64]


def prefill(model: Evo2, prompts: Sequence[Prompt], *, chunk: int, room: int = 0) -> tuple[Cache, torch.Tensor]:
    """Read the prompts from their beginning.

    Args:
        model: in eval mode.
        prompts: token ids [L] of each row, at least one; reading is cheapest when they are sorted by length.
        chunk: most tokens, over all rows, that enter the model at once; at least one per row does.
        room: tokens that will follow each prompt, for whose keys and values room is made.

    Returns:
        The cache of all rows, and the logits after each one's last token, fp32 [B, V].
    """
    caches, logits = [], []
    for group in similar_lengths([len(prompt) for prompt in prompts]):
        rows = [prompts[row] for row in group]
        cache = model.new_cache(len(rows), reserve=max(map(len, rows)) + room)
        logits.append(_last_logits(model, rows, cache, max(1, chunk // len(rows))))
        caches.append(cache)
    return (caches[0] if len(caches) == 1 else Cache.concat(caches)), torch.cat(logits)


def similar_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield runs of neighbours that waste little on padding.

    >>> list(similar_lengths([5, 60, 1000, 1100, 9000]))
    [[0, 1], [2, 3], [4]]
    """
    group: list[int] = []
    for index, length in enumerate(lengths):
        inside = [lengths[i] for i in group] + [length]
        tokens = len(inside) * max(inside)
        if group and tokens > _SMALL_GROUP and sum(inside) < (1 - _MOST_PADDING) * tokens:
            yield group
            group = []
        group.append(index)
    yield group


def _last_logits(model: Evo2, prompts: Sequence[Prompt], cache: Cache, chunk: int) -> torch.Tensor:
    """Run the prompts through `cache` and return the logits after each one's last token, fp32 [B, V]."""
    ids, mask = padded(prompts, pad_id=model.tokenizer.pad_id, device=model.device)
    last = [len(prompt) - 1 for prompt in prompts]
    found: dict[int, torch.Tensor] = {}
    for start, output in forward_chunks(model, ids, mask, chunk=chunk, cache=cache):
        stop = start + output.logits.shape[1]
        found |= {row: output.logits[row, at - start].float() for row, at in enumerate(last) if start <= at < stop}
    return torch.stack([found[row] for row in range(len(prompts))])
