"""Representations of sequences, per token or pooled to one vector.

Pooling looks at nucleotides or residues only: ESM-2's ``<cls>`` and ``<eos>`` and the batch's padding never enter a
mean or a per-token result. Vectors leave as fp32 whatever the model's dtype; means are taken in fp32 or better.

A DNA sequence above the token budget enters the model in chunks of that size. They are pooled as they come, so that a
long sequence needs no more memory than a short one, unless one vector per nucleotide was asked for.

A protein longer than any in training is read in overlapping windows, whose vectors are averaged with the weights of
:mod:`cistron.inference.protein_windows`; its ``<cls>`` is the windows' mean, each weighted by the residues that it
stands for. Nothing is cut off. `window` sets another size; one as long as the protein reads it whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.errors import InputError
from cistron.inference.batching import (
    TOKEN_BUDGET,
    check_token_budget,
    checked_sequences,
    length_sorted_batches,
    packed,
    padded,
)
from cistron.inference.chunked import forward_chunks
from cistron.inference.finite import without_nan
from cistron.inference.masked import with_ends
from cistron.inference.pooling import Pool, Pooling, Row
from cistron.inference.protein_windows import ProteinWindow, check_window, overlapping_windows, residues_per_window
from cistron.models.base import SequenceModel
from cistron.models.naming import canonical_layer

Layer: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class Embedding:
    """Representations of one sequence.

    Attributes:
        vectors: by layer, spelt as in the request: float32 [H], or [num_tokens, H] with pooling ``none``.
        num_tokens: number of nucleotides or residues.
    """

    vectors: dict[Layer, NDArray[np.float32]]
    num_tokens: int


@torch.inference_mode()
def embed_sequences(
    model: SequenceModel,
    sequences: Iterable[str],
    *,
    layers: Sequence[Layer] = (-1,),
    pooling: Pooling = "mean",
    window: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Embedding]:
    """Embed sequences; results come in the order of the request and do not depend on what shared a batch.

    Args:
        model: Evo 2 or ESM-2.
        sequences: DNA or protein.
        layers: names such as ``blocks.3``, ``blocks.3.mlp``, ``embedding`` and ``final_norm``, in our, vortex's or
            NeMo's spelling (:mod:`cistron.models.naming`), or indices; -1 is ``final_norm``.
        pooling: ``mean`` over nucleotides or residues; ``cls``, ESM-2's first token; ``last``, the last nucleotide or
            residue; ``none``, one vector per nucleotide or residue.
        window: proteins only; most residues that the model sees at once, its trained length (1,022) unless given.
        token_budget: most tokens of one forward pass, padding included; a longer DNA sequence takes several.

    Raises:
        InputError: the request is empty, an option does not apply, or a layer is neither a name nor an integer.
        SequenceError: a sequence the model cannot read; names its index, the letter and its position.
        UnknownNameError: no such layer.
        CapabilityError: the model returned NaN.
    """
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if pooling == "cls" and model.family != "esm2":
        raise InputError(f"pooling cls needs a <cls> token, which {model.family} does not have; use mean or last")
    check_window(model, window)
    check_token_budget(token_budget)
    names = _canonical(model, layers)
    encoded = [model.tokenizer.encode(sequence) for sequence in checked_sequences(model, sequences, whole=False)]
    lengths, rows = _rows(model, encoded, window)
    recorded = dict.fromkeys(names.values())
    pools = [{name: Pool(pooling, length) for name in recorded} for length in lengths]
    for batch in length_sorted_batches([len(row.ids) for row in rows], token_budget=token_budget):
        _pool_batch(model, [rows[i] for i in batch], pools, chunk=token_budget)
    results = [{name: without_nan(pool.result()) for name, pool in by_name.items()} for by_name in pools]
    return [
        Embedding({layer: vectors[name] for layer, name in names.items()}, length)
        for vectors, length in zip(results, lengths, strict=True)
    ]


def _rows(
    model: SequenceModel, encoded: Sequence[NDArray[np.int64]], window: int | None
) -> tuple[list[int], list[Row]]:
    """Return how many nucleotides or residues each encoded sequence has, and the rows that the model reads."""
    if model.family != "esm2":
        whole = [Row(index, ids, ProteinWindow(0, len(ids), None), 0) for index, ids in enumerate(encoded)]
        return [len(ids) for ids in encoded], whole
    lengths = [len(ids) - 2 for ids in encoded]
    size = residues_per_window(model, window, longest=max(lengths))
    rows = [
        Row(index, with_ends(ids[1 + part.start : 1 + part.stop]), part, 1)
        for index, ids in enumerate(encoded)
        for part in overlapping_windows(lengths[index], window=size)
    ]
    return lengths, rows


def _pool_batch(model: SequenceModel, batch: Sequence[Row], pools: Sequence[Mapping[str, Pool]], *, chunk: int) -> None:
    """Run one batch and hand its representations to the pools of its rows' sequences, which are by layer."""
    names, rows = tuple(pools[0]), [row.ids for row in batch]
    if model.family == "esm2":
        ids, cu_seqlens = packed(rows, device=model.device)
        states = model(ids, cu_seqlens=cu_seqlens, hidden_states=names).hidden_states
        for row, (start, stop) in zip(batch, pairwise(cu_seqlens.tolist()), strict=True):
            for name, pool in pools[row.index].items():
                pool.add(row, 0, states[name][start:stop])
        return
    ids, mask = padded(rows, pad_id=model.tokenizer.pad_id, device=model.device)
    for start, output in forward_chunks(model, ids, mask, chunk=chunk, hidden_states=names):
        for place, row in enumerate(batch):
            for name, pool in pools[row.index].items():
                pool.add(row, start, output.hidden_states[name][place])


def _canonical(model: SequenceModel, layers: Sequence[Layer]) -> dict[Layer, str]:
    """Return the canonical name of each requested layer."""
    chosen = [] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    if not chosen:
        raise InputError(f"layers must be a list of at least one name or index, got {layers!r}")
    if wrong := [layer for layer in chosen if isinstance(layer, bool) or not isinstance(layer, str | int | np.integer)]:
        raise InputError(f"layers must be names or integers, got {wrong[0]!r}")
    names = {layer: layer if isinstance(layer, str) else int(layer) for layer in chosen}
    return {layer: canonical_layer(name, num_layers=len(model.blocks)) for layer, name in names.items()}
