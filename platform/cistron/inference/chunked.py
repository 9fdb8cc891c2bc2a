"""One forward pass in pieces, so that memory does not grow with the length of the sequence.

A causal model needs of the tokens before a piece only its cache: states of constant size, and an attention layer's keys
and values. The pieces' outputs together are those of the whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from cistron.errors import InputError
from cistron.models.base import SequenceModel
from cistron.models.evo2.cache import Cache
from cistron.models.evo2.model import Evo2
from cistron.models.outputs import ModelOutput


@torch.inference_mode()
def forward_chunks(
    model: SequenceModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    chunk: int,
    hidden_states: Sequence[str | int] = (),
    cache: Cache | None = None,
    with_logits: bool = True,
) -> Iterator[tuple[int, ModelOutput]]:
    """Run right-padded rows in pieces of at most `chunk` tokens; hold on to no output after the next is asked for.

    Rows that fit one piece run without a cache. So does a model that reads both sides of a token, in a single piece of
    any length: it has no state that could be carried.

    Args:
        model: Evo 2, or ESM-2 in a single piece.
        ids: [B, L] token ids.
        mask: [B, L] bool, true at real tokens; padding is on the right.
        chunk: most tokens of each row in one piece.
        hidden_states: names or indices of the representations to return.
        cache: continue its rows, and update it; without one, rows begin here.
        with_logits: as in ``Evo2.forward``; ESM-2 always has them.

    Yields:
        Where the piece begins, and its output, [B, piece, ...]. Values at padding have no meaning.

    Raises:
        InputError: `chunk` is not positive, a cache for a model that has none, or what the forward pass refuses.
        UnknownNameError: a representation of that name does not exist.
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    if not isinstance(model, Evo2):
        if cache is not None:
            raise InputError(f"{model.family} reads both sides of a token, so it cannot continue a cache")
        yield 0, model(ids, attention_mask=mask, hidden_states=hidden_states)
        return
    run = partial(model, hidden_states=hidden_states, with_logits=with_logits)
    width = ids.shape[1]
    if cache is None and width <= chunk:
        yield 0, run(ids, attention_mask=mask)
        return
    if cache is None:
        cache = model.new_cache(len(ids), reserve=width)
    shortest = int(mask.sum(dim=1).min())
    for start in range(0, width, chunk):
        part = slice(start, start + chunk)
        # Without a mask the layers know that no row ends here, and take cheaper paths.
        piece_mask = mask[:, part] if min(part.stop, width) > shortest else None
        yield start, run(ids[:, part], attention_mask=piece_mask, cache=cache)
