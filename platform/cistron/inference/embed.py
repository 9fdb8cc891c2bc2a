"""Representations of sequences, per token or pooled to one vector.

Pooling looks at nucleotides or residues only: ESM-2's ``<cls>`` and ``<eos>`` and the batch's padding never enter a
mean or a per-token result. Vectors leave as fp32 whatever the model's dtype; means are taken in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.errors import InputError
from cistron.inference.batching import (
    TOKEN_BUDGET,
    check_token_budget,
    checked_sequences,
    length_sorted_batches,
    padded,
)
from cistron.models.base import SequenceModel
from cistron.models.naming import canonical_layer

Pooling: TypeAlias = Literal["mean", "cls", "last", "none"]
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
    token_budget: int = TOKEN_BUDGET,
) -> list[Embedding]:
    """Embed sequences; results come in the order of the request and do not depend on what shared a batch.

    Args:
        model: Evo 2 or ESM-2.
        sequences: DNA or protein.
        layers: names such as ``blocks.3``, ``embedding`` and ``final_norm``, or indices; -1 is ``final_norm``.
        pooling: ``mean`` over nucleotides or residues; ``cls``, ESM-2's first token; ``last``, the last nucleotide or
            residue; ``none``, one vector per nucleotide or residue.
        token_budget: most tokens of one forward pass, padding included.

    Raises:
        InputError: the request is empty or an option does not apply.
        SequenceError: a sequence the model cannot read; names its index, the letter and its position.
        UnknownNameError: no such layer.
    """
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if pooling == "cls" and model.family != "esm2":
        raise InputError(f"pooling cls needs a <cls> token, which {model.family} does not have; use mean or last")
    check_token_budget(token_budget)
    names = _canonical(model, layers)
    rows = [model.tokenizer.encode(sequence) for sequence in checked_sequences(model, sequences)]
    num_special = 1 if model.family == "esm2" else 0
    results: dict[int, Embedding] = {}
    for batch in length_sorted_batches([len(row) for row in rows], token_budget=token_budget):
        ids, mask = padded([rows[i] for i in batch], pad_id=model.tokenizer.pad_id, device=model.device)
        states = model(ids, attention_mask=mask, hidden_states=tuple(dict.fromkeys(names.values()))).hidden_states
        for row, index in enumerate(batch):
            length = len(rows[index])
            vectors = {
                layer: _pool(states[name][row, :length], pooling, num_special=num_special)
                for layer, name in names.items()
            }
            results[index] = Embedding(vectors, length - 2 * num_special)
    return [results[index] for index in range(len(rows))]


def _canonical(model: SequenceModel, layers: Sequence[Layer]) -> dict[Layer, str]:
    """Return the canonical name of each requested layer."""
    if isinstance(layers, str | int) or not layers:
        raise InputError(f"layers must be a list of at least one name or index, got {layers!r}")
    return {layer: canonical_layer(layer, num_layers=len(model.blocks)) for layer in layers}


def _pool(state: torch.Tensor, pooling: Pooling, *, num_special: int) -> NDArray[np.float32]:
    """Pool one sequence's representations [L, H], of which `num_special` at either end belong to special tokens."""
    inner = state[num_special : len(state) - num_special].float()
    match pooling:
        case "mean":
            pooled = inner.mean(dim=0)
        case "cls":
            pooled = state[0].float()
        case "last":
            pooled = inner[-1]
        case "none":
            pooled = inner
    return pooled.cpu().numpy()
