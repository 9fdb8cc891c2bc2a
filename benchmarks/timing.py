"""Paired timings and the record that they leave."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch

KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "4294967296"}
"""For the C library's allocator: tensors above 32 MiB are not returned to the system when they are freed."""
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Tensors above 1 MiB are, so that a peak is what was in use; what is kept otherwise differs by 100 MiB and more."""
RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, float]:
    """Return each candidate's median seconds.

    They take turns, so that a noisy minute hurts all alike, and every other round in the opposite order, so that none
    always finds the caches that the same other one left.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        for name, run in list(candidates.items())[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_new_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Return what a module's function returns in a process of its own, with more environment variables.

    Nothing has been allocated there before, and the C library reads the variables only when a process begins.
    """
    with (
        patch.dict(os.environ, environment),
        ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


def write_record(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows with the machine, the versions and the date below `results`."""
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("cistron", "torch", "ray")}},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
