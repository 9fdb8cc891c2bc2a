"""Which residues touch: ESM-2's contact head, a logistic regression on its attention maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cistron.errors import CapabilityError, InputError
from cistron.inference.batching import checked_sequences, length_sorted_batches, padded
from cistron.inference.memory import available_bytes
from cistron.models.base import SequenceModel
from cistron.models.esm2.model import Esm2

_TOKEN_BUDGET: Final = 2_048
"""Tokens in one forward pass: maps grow with the square of the length, and larger batches gain no speed."""

_MAPS_AT_ONCE: Final = 5
"""Matrices [T, T] fp32 of a protein of T tokens that exist together: the sum over layers, the one over a layer's heads,
a head's attention before or after the softmax, and two of arithmetic between them."""
_GIB: Final = 1 << 30


@torch.inference_mode()
def predict_contacts(model: SequenceModel, sequences: Iterable[str]) -> list[NDArray[np.float32]]:
    """Return each protein's contact probabilities, float32 [L, L], symmetric, in the order of the request.

    Memory grows with L^2, about five times that of the result, whatever the number of layers and heads.

    Raises:
        InputError: the request is empty, or the model is not ESM-2.
        SequenceError: a sequence the model cannot read; names its index, the letter and its position.
        CapabilityError: the model's device has less memory left than the longest protein needs.
    """
    if not isinstance(model, Esm2):
        raise InputError(f"contacts need an ESM-2 model, and this is {model.family}")
    rows = [model.tokenizer.encode(sequence) for sequence in checked_sequences(model, sequences)]
    _check_memory([len(row) for row in rows], device=model.device)
    results: dict[int, NDArray[np.float32]] = {}
    for batch in length_sorted_batches([len(row) for row in rows], token_budget=_TOKEN_BUDGET):
        ids, mask = padded([rows[i] for i in batch], pad_id=model.tokenizer.pad_id, device=model.device)
        contacts = model.predict_contacts(ids, attention_mask=mask).float().cpu().numpy()
        for row, index in enumerate(batch):
            length = len(rows[index]) - 2
            results[index] = contacts[row, :length, :length]
    return [results[index] for index in range(len(rows))]


def _check_memory(lengths: Sequence[int], *, device: torch.device) -> None:
    """Refuse a protein of so many tokens that its maps do not fit, before anything is computed."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    needed, left = _MAPS_AT_ONCE * lengths[longest] ** 2 * torch.float32.itemsize, available_bytes(device)
    if left is not None and needed > left:
        raise CapabilityError(
            f"sequence {longest}: contacts of {lengths[longest] - 2:,} residues need about {needed:,} bytes "
            f"({needed / _GIB:.1f} GiB), and {device} has {left / _GIB:.1f} GiB left; predict its domains one by one"
        )
