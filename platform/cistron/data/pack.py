"""Documents laid end to end within a token budget, their borders kept in ``cu_seqlens``.

A packed batch has no padding, and the model neither attends, convolves nor carries a state across a border. Packing is
first-fit in order of arrival: the same samples give the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from cistron.data.samples import TrainingSample
from cistron.errors import InputError


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N documents of T tokens together.

    Attributes:
        input_ids: [T] int64.
        targets: [T] int64, -100 where nothing is asked.
        weights: [T] float32, 0 where nothing is asked.
        cu_seqlens: [N+1] int32, offsets of the documents, from 0 to T.
        sample_index: [N] int64.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    cu_seqlens: torch.Tensor
    sample_index: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on `device`."""
        moved = {item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)}
        return PackedBatch(**moved)


def pack(samples: Iterable[TrainingSample], *, token_budget: int) -> list[PackedBatch]:
    """Lay `samples` into batches of at most `token_budget` tokens each.

    Each sample goes to the first batch that has room for it, in order of arrival.

    Raises:
        InputError: a sample alone is longer than the budget; names it.
    """
    groups: list[list[TrainingSample]] = []
    room: list[int] = []
    for sample in samples:
        length = len(sample.input_ids)
        if length > token_budget:
            raise InputError(
                f"sample {sample.sample_index} has {length:,} tokens, more than token_budget={token_budget:,}: "
                "raise the budget or lower max_length"
            )
        place = next((i for i, left in enumerate(room) if left >= length), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(token_budget)
        groups[place].append(sample)
        room[place] -= length
    return [_lay(group) for group in groups]


def _lay(samples: Sequence[TrainingSample]) -> PackedBatch:
    """Concatenate one group."""
    offsets = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate([sample.targets for sample in samples]).astype(np.int64)),
        weights=torch.from_numpy(np.concatenate([sample.weights for sample in samples])),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        sample_index=torch.tensor([sample.sample_index for sample in samples], dtype=torch.int64),
    )
