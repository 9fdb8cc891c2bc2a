"""How long something takes on the GPU.

A round's untimed part (inputs, the forward pass before a backward pass) runs first. Then the GPU overwrites a buffer
much larger than its cache: that empties the cache, and keeps the GPU busy while Python queues the launches, so that
what lies between the two events is the kernels' time and not Python's. Rounds rotate over several sets of inputs; the
result is the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch

Work: TypeAlias = Callable[[int], Callable[[], object]]
"""Prepares round i and returns what is to be timed."""

SPACER_BYTES: Final = 1 << 30
MOST_SECONDS: Final = 0.2
"""Of one measurement, about; the slowest things get a single round after the one that warms up."""
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30
ROTATED_CACHES: Final = 2
"""Sets of inputs fill at least this many times the cache."""


class Clock:
    """Times work on one device; without a GPU it only runs it, and returns what the host's clock says.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spacer: torch.Tensor | None = None
        if device.type == "cuda":
            self._spacer = torch.empty(SPACER_BYTES, dtype=torch.int8, device=device)

    def seconds(self, work: Work) -> float:
        """Return the median time of the work."""
        if self._spacer is None:
            return _wall_seconds(work(0))
        for warm_up in range(2):
            thunk = work(warm_up)
            self.wait()
            once = _wall_seconds(thunk, self.wait)
        if once > MOST_SECONDS:
            return once
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(MOST_SECONDS / once)))
        pairs = [self._between_events(work(i)) for i in range(rounds)]
        self.wait()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3

    def num_sets(self, set_bytes: int) -> int:
        """Return how many sets of inputs of that size to rotate over."""
        if self.device.type != "cuda":
            return 1
        cache = int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50 << 20))
        return max(1, min(8, -(-ROTATED_CACHES * cache // max(set_bytes, 1))))

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _between_events(self, thunk: Callable[[], object]) -> tuple[Any, Any]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        assert self._spacer is not None
        self._spacer.zero_()
        start.record()
        thunk()
        stop.record()
        return start, stop


def _wall_seconds(thunk: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    start = time.perf_counter()
    thunk()
    wait()
    return time.perf_counter() - start
