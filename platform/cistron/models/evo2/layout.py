"""How the tokens of a batch lie: padded rows, documents packed end to end, or the next chunk of cached rows.

Whatever depends on that is worked out once per forward pass. Matrix products and norms run on the tokens as they lie;
convolutions and scans need whole documents as rows, which :meth:`Layout.by_document` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cistron.errors import InputError
from cistron.models.evo2.cache import Cache
from cistron.models.layers.inputs import check_rows, packed_offsets


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of similar length, which share one right-padded view.

    Attributes:
        tokens: [M] int, places of their tokens among all T packed ones.
        slots: [M] int, places of the same tokens in the flattened view.
        shape: (documents, longest length) of the view.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens stand.

    Attributes:
        positions: [L], [B, L] or [T] int, position inside the document.
        lengths: [B] int, real tokens of each row of this chunk; None when there is no cache or nothing is padded.
        cu_seqlens: [N+1] int offsets of packed documents in host memory, or None for rows.
        buckets: the packed documents by length; empty for rows.
    """

    positions: torch.Tensor
    lengths: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    buckets: tuple[Bucket, ...] = ()

    def by_document(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Apply a causal function of rows, [B, L, C] -> [B, L, D], to [B, L, C] or to packed [T, C].

        What stands right of a document's end cannot reach it, as the function is causal.
        """
        if self.cu_seqlens is None:
            return function(x)
        if len(self.buckets) == 1 and len(x) == math.prod(self.buckets[0].shape):
            return function(x.view(*self.buckets[0].shape, -1)).flatten(0, 1)
        pieces = []
        for bucket in self.buckets:
            count, longest = bucket.shape
            rows = x.new_zeros(count * longest, x.shape[1]).index_copy(0, bucket.slots, x[bucket.tokens])
            pieces.append(function(rows.view(count, longest, -1)).flatten(0, 1)[bucket.slots])
        order = torch.cat([bucket.tokens for bucket in self.buckets])
        joined = torch.cat(pieces)
        return torch.empty_like(joined).index_copy(0, order, joined)


def padded_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, vocab_size: int) -> Layout:
    """Lay out right-padded rows [B, L]; a causal model needs no mask to ignore what is on the right.

    Raises:
        InputError: wrong shapes or dtype, no tokens, an id outside the vocabulary, or padding that is not on the right.
    """
    check_rows(input_ids, attention_mask, vocab_size=vocab_size)
    _real_lengths(attention_mask)
    return Layout(positions=torch.arange(input_ids.shape[1], device=input_ids.device))


def cached_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache, *, vocab_size: int
) -> Layout:
    """Lay out the next chunk of the cache's rows, [B, L].

    Raises:
        InputError: as :func:`padded_layout`, or another number of rows than the cache has.
    """
    check_rows(input_ids, attention_mask, vocab_size=vocab_size)
    if len(input_ids) != cache.batch_size:
        raise InputError(f"the cache has {cache.batch_size} rows, input_ids has {len(input_ids)}")
    lengths = _real_lengths(attention_mask)
    offsets = torch.arange(input_ids.shape[1], device=input_ids.device)
    return Layout(positions=cache.lengths[:, None] + offsets, lengths=lengths)


def packed_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor, *, vocab_size: int
) -> Layout:
    """Lay out packed documents [T].

    Raises:
        InputError: wrong shapes, an id outside the vocabulary, offsets that do not run from 0 to T, or an attention
            mask beside them.
    """
    offsets, positions = packed_offsets(input_ids, attention_mask, cu_seqlens, vocab_size=vocab_size)
    return Layout(
        positions=positions.to(input_ids.device),
        cu_seqlens=offsets,
        buckets=_buckets(offsets[:-1], offsets.diff(), input_ids.device),
    )


def _buckets(starts: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> tuple[Bucket, ...]:
    """Group documents whose lengths lie between the same powers of two, so that padding at most doubles the work."""
    magnitude = torch.tensor([length.bit_length() for length in lengths.tolist()])
    found = []
    for value in sorted(set(magnitude[lengths > 0].tolist())):
        chosen = magnitude == value
        longest = int(lengths[chosen].max())
        count = int(chosen.sum())
        inside = torch.arange(longest) < lengths[chosen, None]
        tokens = (starts[chosen, None] + torch.arange(longest))[inside]
        slots = torch.arange(count * longest).view(count, longest)[inside]
        found.append(Bucket(tokens.to(device), slots.to(device), (count, longest)))
    return tuple(found)


def _real_lengths(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return each row's number of real tokens [B], or None without a mask."""
    if attention_mask is None:
        return None
    real = attention_mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise InputError("attention_mask: padding must be on the right, but a padded position precedes a real one")
    return real.sum(dim=1)
