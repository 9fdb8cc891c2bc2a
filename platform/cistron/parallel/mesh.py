"""This process among its peers: its rank, its device, and the few sums that a training step needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """One process of a data-parallel group.

    Attributes:
        rank: place of this process among all.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device
    _control: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def current(cls) -> World:
        """Return the world of the initialised default process group, or a world of one without a group.

        Counts travel over a gloo group of their own, from CPU to CPU: no rank waits for its GPU to send one.
        """
        device = _local_device()
        if not dist.is_initialized():
            return cls(rank=0, size=1, device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Return whether this process writes what is written once."""
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """Return the one-dimensional device mesh of the data-parallel ranks."""
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("data",))

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, element by element, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_max(self, values: Sequence[float]) -> list[float]:
        """Return the maxima over all ranks, element by element."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered  # type: ignore[return-value]  # every place has been filled by now

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        buffer = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(buffer, op=operation, group=self._control)
        return buffer.tolist()


def _local_device() -> torch.device:
    """Return this process's GPU, as its launcher numbered it, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
