"""Requests to batches, padded or packed, and the checks at the door that every kind of request shares.

Batches are filled by a budget of tokens, padding included, from sequences sorted by length, so that padded ones hold
little padding. Which sequences share a batch never changes a result: padding is masked, packed sequences do not see
each other, and results go back to the order of the request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.errors import InputError
from cistron.models.base import SequenceModel
from cistron.models.families import config_of

logger = logging.getLogger(__name__)

TOKEN_BUDGET: Final = 16_384
"""Default number of tokens in one forward pass, padding included."""


def length_limit(model: SequenceModel) -> int | None:
    """Return the longest sequence that the model may read, or None: ESM-2 reads any length, if with less skill."""
    return config_of(model).max_length if model.family == "evo2" else None


def checked_sequences(
    model: SequenceModel, sequences: Iterable[str], *, what: str = "sequence", limited: bool = True, whole: bool = True
) -> list[str]:
    """Return the sequences as the model reads them; errors name the place in the request.

    An ESM-2 sequence longer than any in training is read, with a warning if it is read `whole`, that is, in one piece;
    a longer one for Evo 2 if not `limited`.

    Raises:
        InputError: `sequences` is one string, is empty, or holds something that is not a string.
        SequenceError: a sequence is empty, too long for the model, or has a letter outside the model's alphabet.
    """
    if isinstance(sequences, str):
        raise InputError(f"{what}s: give a list of strings, not one string")
    checked, limit = [], length_limit(model) if limited else None
    for index, sequence in enumerate(sequences):
        name = f"{what} {index}"
        if not isinstance(sequence, str):
            raise InputError(f"{name}: must be a string, got {type(sequence).__name__}")
        checked.append(model.tokenizer.validate(sequence, name=name, max_length=limit))
    if not checked:
        raise InputError(f"{what}s: the request is empty")
    longest, trained = max(map(model.tokenizer.num_letters, checked)), config_of(model).max_length
    if limited and whole and longest > trained:
        logger.warning("%s reads a sequence of %d residues, but was trained on %d", model.family, longest, trained)
    return checked


def check_token_budget(token_budget: int) -> None:
    """Raise ``InputError`` unless the budget is a positive number of tokens."""
    if not isinstance(token_budget, Integral) or token_budget < 1:
        raise InputError(f"token_budget must be at least 1, got {token_budget!r}")


def length_sorted_batches(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Yield indices of the sequences of each batch, longest first; one sequence above the budget goes alone.

    >>> list(length_sorted_batches([2, 9, 3, 3], token_budget=6))
    [[1], [2, 3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(
    rows: Sequence[NDArray[np.int64]], *, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, L], padded on the right, and the mask [B, L] that is true at real tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    mask = torch.arange(width)[None, :] < lengths[:, None]
    return ids.to(device), mask.to(device)


def packed(rows: Sequence[NDArray[np.int64]], *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' ids end to end, [T], and their N + 1 offsets from 0 to T, int32 in host memory."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(offsets)
