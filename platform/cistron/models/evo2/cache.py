"""What Evo 2 remembers of the tokens it has read: constant-size states of the convolutions, keys and values.

A cache belongs to a batch of rows. Each row has read its own number of tokens; a forward pass with the cache continues
every row after its own last real token, and updates the cache in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

import torch
from torch.nn import functional

_LEAST_ROOM: Final = 6
"""Steps between two moves of a short filter's inputs to the front of their buffer."""


@dataclass(slots=True)
class FirState:
    """The last inputs of a finite filter, in a buffer with room for more: a step writes one slot and moves nothing.

    Attributes:
        inputs: [B, N, C], time before channels.
        count: inputs that the filter remembers, K-1.
        end: slot behind the last input.
    """

    inputs: torch.Tensor
    count: int
    end: int

    @classmethod
    def of(cls, last: torch.Tensor) -> FirState:
        """Return the state that holds the last inputs [B, C, K-1], oldest first, with room for as many again."""
        batch, channels, count = last.shape
        inputs = last.new_empty(batch, count + max(count, _LEAST_ROOM), channels)
        inputs[:, :count] = last.transpose(1, 2)
        return cls(inputs, count, count)

    def last(self) -> torch.Tensor:
        """Return the last inputs as a view [B, C, K-1], oldest first."""
        return self.inputs[:, self.end - self.count : self.end].transpose(1, 2)

    def next_slot(self) -> int:
        """Return the slot for the next input, which counts as filled from now on."""
        if self.end == self.inputs.shape[1]:
            self.inputs[:, : self.count] = self.inputs[:, self.end - self.count :]
            self.end = self.count
        self.end += 1
        return self.end - 1

    def select(self, rows: torch.Tensor) -> FirState:
        """Return a copy of the given rows."""
        return FirState.of(self.last()[rows])


@dataclass(slots=True)
class HyenaState:
    """State of a Hyena layer.

    Attributes:
        projection: the last inputs of the projection filter, 3H channels.
        operator: the last inputs of an HCS or HCM filter, or HCL's modal state [B, H, S] in fp32.
    """

    projection: FirState
    operator: FirState | torch.Tensor

    def select(self, rows: torch.Tensor) -> HyenaState:
        """Return a copy of the given rows."""
        operator = self.operator
        chosen = operator.select(rows) if isinstance(operator, FirState) else operator[rows]
        return HyenaState(self.projection.select(rows), chosen)

    @classmethod
    def concat(cls, states: Sequence[HyenaState]) -> HyenaState:
        """Return the rows of all states, in order."""
        projection = FirState.of(torch.cat([state.projection.last() for state in states]))
        if isinstance(states[0].operator, FirState):
            operators = [cast("FirState", state.operator).last() for state in states]
            return cls(projection, FirState.of(torch.cat(operators)))
        return cls(projection, torch.cat([cast("torch.Tensor", state.operator) for state in states]))


@dataclass(slots=True)
class AttentionState:
    """Keys and values of an attention layer, head by head, in buffers with room for more.

    Attributes:
        keys: [B, A, capacity, D], rotated; row b is filled up to the number of tokens it has read, the rest is finite.
        values: [B, A, capacity, D].
        lengths: tokens that each row has read, in host memory, where the choice of a kernel is made.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: tuple[int, ...]

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store tokens behind each row's last one and return everything stored, [B, A, longest + L, D].

        A row's padding is stored too, right of its real tokens: no query looks there before later tokens overwrite it.

        Args:
            keys: [B, A, L, D], rotated.
            values: [B, A, L, D].
            lengths: [B], how many of the L tokens are real; all of them if None.
        """
        added = keys.shape[2]
        longest = max(self.lengths) + added
        self._reserve(longest)
        self._store(self.keys, keys)
        self._store(self.values, values)
        real = [added] * len(keys) if lengths is None else lengths.tolist()
        self.lengths = tuple(start + count for start, count in zip(self.lengths, real, strict=True))
        return self.keys[:, :, :longest], self.values[:, :, :longest]

    def select(self, rows: torch.Tensor) -> AttentionState:
        """Return a copy of the given rows."""
        lengths = tuple(self.lengths[row] for row in rows.tolist())
        return AttentionState(self._copied(self.keys, rows), self._copied(self.values, rows), lengths)

    @classmethod
    def concat(cls, states: Sequence[AttentionState]) -> AttentionState:
        """Return the rows of all states, in order."""
        room = max(state.keys.shape[2] for state in states)
        keys, values = (
            torch.cat([functional.pad(buffer, (0, 0, 0, room - buffer.shape[2])) for buffer in buffers])
            for buffers in ([state.keys for state in states], [state.values for state in states])
        )
        return cls(keys, values, tuple(length for state in states for length in state.lengths))

    def _store(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Write [B, A, L, D] behind each row's last token."""
        start, added = self.lengths[0], new.shape[2]
        if len(set(self.lengths)) == 1:
            buffer[:, :, start : start + added] = new
            return
        rows = torch.arange(len(new), device=new.device)[:, None]
        slots = torch.tensor(self.lengths, device=new.device)[:, None] + torch.arange(added, device=new.device)
        buffer[rows, :, slots] = new.transpose(1, 2).to(buffer.dtype)

    def _copied(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of a buffer with as much room; what nobody has filled is not read."""
        used = max(self.lengths)
        copied = buffer.new_zeros(len(rows), *buffer.shape[1:])
        copied[:, :, :used] = buffer[rows, :, :used]
        return copied

    def _reserve(self, slots: int) -> None:
        """Make room, a quarter more than there was: old and new buffers exist together while one is copied."""
        capacity = self.keys.shape[2]
        if slots > capacity:
            missing = max(slots, capacity + capacity // 4) - capacity
            self.keys = functional.pad(self.keys, (0, 0, 0, missing))
            self.values = functional.pad(self.values, (0, 0, 0, missing))


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

    @classmethod
    def concat(cls, caches: Sequence[Cache]) -> Cache:
        """Return the rows of all caches of one model, in order, as a copy.

        >>> Cache.concat([Cache(torch.tensor([3]), []), Cache(torch.tensor([5, 1]), [])]).lengths.tolist()
        [3, 5, 1]
        """
        layers = [_concat(states) for states in zip(*(cache.layers for cache in caches), strict=True)]
        return cls(torch.cat([cache.lengths for cache in caches]), layers)


def _concat(states: Sequence[LayerState]) -> LayerState:
    """Return the rows of one layer's states, in order."""
    if isinstance(states[0], HyenaState):
        return HyenaState.concat(cast("Sequence[HyenaState]", states))
    return AttentionState.concat(cast("Sequence[AttentionState]", states))
