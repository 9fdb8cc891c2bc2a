"""Helpers for tests: several processes on one machine, and comparisons that say how far off a tensor is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

T = TypeVar("T")


def run_distributed(function: Callable[..., T], *arguments: Any, world_size: int = 2) -> list[T]:
    """Call `function(*arguments)` in `world_size` fresh processes that share a gloo group.

    Args:
        function: importable by name, because the processes are spawned.
        arguments: picklable.
        world_size: number of processes.

    Returns:
        Each rank's picklable result, in rank order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, args=(world_size, folder, function, arguments), nprocs=world_size)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, relative: float, name: str = "tensor") -> None:
    """Check that the largest difference is at most `relative` times the largest expected magnitude.

    Raises:
        AssertionError: with the measured difference, or the shapes when they differ.
    """
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    limit = relative * (expected.double().abs().max().item() if expected.numel() else 0.0)
    assert difference <= limit, f"{name}: off by {difference:.3e}, allowed {limit:.3e} ({relative:g} of the largest)"


def assert_all_close(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, relative: float
) -> None:
    """Check two families of tensors by name, each against the largest magnitude among all expected ones."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    largest = max(tensor.double().abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        difference = (actual[name].double() - tensor.double()).abs().max().item()
        assert difference <= relative * largest, f"{name}: off by {difference:.3e}, allowed {relative * largest:.3e}"


def _enter(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
