"""Where a step's time goes: the kernels that take most of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

MOST_KERNELS: Final = 15
_NAME_LENGTH: Final = 100


def kernel_shares(step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Run a step and return its costliest kernels with their shares of the GPU's busy time; nothing without a GPU."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize(device)
    kernels = [event for event in found.key_averages() if event.device_type.name == "CUDA"]
    total = sum(event.self_device_time_total for event in kernels)
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [
        {
            "kernel": event.key[:_NAME_LENGTH],
            "share": round(event.self_device_time_total / total, 4),
            "calls": event.count,
            "us": round(event.self_device_time_total),
        }
        for event in kernels[:MOST_KERNELS]
    ]
