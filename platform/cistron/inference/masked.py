"""Masked passes of ESM-2: hide one residue, ask the model what stands there.

Each asked residue is one document, the window of :mod:`cistron.inference.protein_windows` around it. Documents are
packed end to end up to the token budget, so nothing is spent on padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.alphabets import MASK
from cistron.errors import InputError, SequenceError
from cistron.inference.batching import (
    TOKEN_BUDGET,
    check_token_budget,
    checked_sequences,
    length_sorted_batches,
    packed,
)
from cistron.inference.finite import without_nan
from cistron.inference.protein_windows import centred_start, residues_per_window
from cistron.models.base import SequenceModel
from cistron.tokenizers import ProteinTokenizer

Place: TypeAlias = tuple[int, int]
"""Index of a sequence, and 0-based position of a residue in it."""


@torch.inference_mode()
def pseudo_perplexity(
    model: SequenceModel,
    sequences: Iterable[str],
    *,
    window: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[float]:
    """Return exp(-PLL / L) of each protein, PLL the sum over all L residues of log p(residue | all the others).

    Every residue is masked once and compared with itself, the first and the last included (Salazar et al. 2020,
    doi:10.18653/v1/2020.acl-main.240); scripts in circulation are off by one and leave the ends out.

    Args:
        model: ESM-2.
        sequences: proteins.
        window: residues around a masked one that the model sees; its trained length unless given.
        token_budget: most tokens of one forward pass, padding included.

    Raises:
        InputError: the request is empty, or the model is not ESM-2.
        SequenceError: a sequence the model cannot read, or one that holds ``<mask>``.
    """
    if model.family != "esm2":
        raise InputError(f"pseudo-perplexity needs an ESM-2 model, and this is {model.family}")
    check_token_budget(token_budget)
    checked = checked_sequences(model, sequences, whole=False)
    values = masked_log_probs(model, checked, window=window, token_budget=token_budget)
    return [math.exp(-v.mean(dtype=np.float64)) for v in values]


def masked_log_probs(
    model: SequenceModel, sequences: Sequence[str], *, window: int | None = None, token_budget: int = TOKEN_BUDGET
) -> list[NDArray[np.float32]]:
    """Return each residue's log-probability with that residue masked, float32 [L] per validated sequence.

    Raises:
        InputError: a window without a residue.
        SequenceError: a sequence holds ``<mask>``, which has no residue to score.
    """
    for index, sequence in enumerate(sequences):
        check_unmasked(sequence, name=f"sequence {index}")
    rows = [residue_ids(model, sequence) for sequence in sequences]
    results = [np.zeros(len(row), dtype=np.float32) for row in rows]
    places = [(index, position) for index, row in enumerate(rows) for position in range(len(row))]
    for chosen, log_probs in log_probs_at(model, rows, places, window=window, token_budget=token_budget):
        for (index, position), found in zip(chosen, log_probs, strict=True):
            results[index][position] = found[rows[index][position]]
    return results


@torch.inference_mode()
def log_probs_at(
    model: SequenceModel,
    rows: Sequence[NDArray[np.int64]],
    places: Sequence[Place],
    *,
    window: int | None,
    token_budget: int,
) -> Iterator[tuple[list[Place], NDArray[np.float32]]]:
    """Mask each of the places alone; yield some of them and the log-probabilities there, [places, V], until all are.

    Args:
        model: ESM-2.
        rows: residues' ids of each sequence, without special tokens.
        places: what to mask.
        window: residues around a masked one that the model sees; its trained length if None.
        token_budget: most tokens of one forward pass, padding included.
    """
    window = residues_per_window(model, window, longest=max(map(len, rows)))
    lengths = [min(len(rows[index]), window) + 2 for index, _ in places]
    for batch in length_sorted_batches(lengths, token_budget=token_budget):
        chosen = [places[i] for i in batch]
        starts = [centred_start(position, length=len(rows[index]), window=window) for index, position in chosen]
        parts = [rows[index][start : start + window] for (index, _), start in zip(chosen, starts, strict=True)]
        ids, cu_seqlens = packed([with_ends(part) for part in parts], device=model.device)
        tokens = [1 + position - start for (_, position), start in zip(chosen, starts, strict=True)]
        at = (cu_seqlens[:-1] + torch.tensor(tokens)).to(ids.device)
        ids[at] = ProteinTokenizer.mask_id
        logits = model(ids, cu_seqlens=cu_seqlens).logits[at]
        yield chosen, without_nan(logits.float().log_softmax(dim=-1).cpu().numpy())


def residue_ids(model: SequenceModel, sequence: str) -> NDArray[np.int64]:
    """Return the ids of a validated protein's residues, without special tokens."""
    return model.tokenizer.encode(sequence)[1:-1]


def with_ends(residues: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids between ``<cls>`` and ``<eos>``."""
    return np.concatenate([[ProteinTokenizer.cls_id], residues, [ProteinTokenizer.eos_id]])


def check_unmasked(sequence: str, *, name: str) -> None:
    """Raise ``SequenceError`` for a sequence with a residue that nobody knows."""
    if MASK in sequence:
        raise SequenceError(f"{name}: {MASK} at position {sequence.index(MASK) + 1} has no residue to score")
