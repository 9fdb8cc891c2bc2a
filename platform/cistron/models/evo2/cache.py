"""What Evo 2 remembers of the tokens it has read: constant-size states of the convolutions, keys and values.

A cache belongs to a batch of rows. Each row has read its own number of tokens; a forward pass with the cache continues
every row after its own last real token, and updates the cache in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(slots=True)
class HyenaState:
    """State of a Hyena layer.

    Attributes:
        projection: [B, 3H, 2], the last inputs of the projection filter.
        operator: the last inputs of an HCS or HCM filter [B, H, K-1], or HCL's modal state [B, H, S] in fp32.
    """

    projection: torch.Tensor
    operator: torch.Tensor

    def select(self, rows: torch.Tensor) -> HyenaState:
        """Return a copy of the given rows."""
        return HyenaState(self.projection[rows], self.operator[rows])


@dataclass(slots=True)
class AttentionState:
    """Keys and values of an attention layer, in buffers that grow by doubling.

    Attributes:
        keys: [B, capacity, A, D], rotated; row b is filled up to the number of tokens it has read.
        values: [B, capacity, A, D].
        used: slots below which any row may be filled.
    """

    keys: torch.Tensor
    values: torch.Tensor
    used: int = 0

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, L, A, D] at `positions` [B, L] and return everything stored, [B, used, A, D].

        A row's padding is stored too, right of its real tokens: no query looks there before later tokens overwrite it.
        """
        self.used += keys.shape[1]
        self._reserve(self.used)
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[rows, positions] = keys.to(self.keys.dtype)
        self.values[rows, positions] = values.to(self.values.dtype)
        return self.keys[:, : self.used], self.values[:, : self.used]

    def select(self, rows: torch.Tensor) -> AttentionState:
        """Return a copy of the given rows."""
        return AttentionState(self.keys[rows], self.values[rows], self.used)

    def _reserve(self, slots: int) -> None:
        capacity = self.keys.shape[1]
        if slots > capacity:
            missing = max(slots, 2 * capacity) - capacity
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, 0, 0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, 0, 0, missing))


LayerState: TypeAlias = HyenaState | AttentionState


@dataclass(slots=True)
class Cache:
    """State of a batch of rows; made by ``Evo2.new_cache``.

    Attributes:
        lengths: [B] int64, tokens that each row has read.
        layers: one state per block.
    """

    lengths: torch.Tensor
    layers: Sequence[LayerState]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def advance(self, lengths: torch.Tensor | int) -> None:
        """Note that the rows have read `lengths` [B] more tokens."""
        self.lengths = self.lengths + lengths

    def select(self, rows: torch.Tensor | Sequence[int]) -> Cache:
        """Return a copy with the given rows, in that order; naming a row twice forks it.

        >>> Cache(torch.tensor([3, 5]), []).select([1, 1, 0]).lengths.tolist()
        [5, 5, 3]
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)
        return Cache(self.lengths[index], [layer.select(index) for layer in self.layers])
