"""Memory: how much a device has left, asked before a request that would take more, and giving back what is unused."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Final

import torch

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")
_MALLOC_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on `device`, or None where that cannot be known.

    On a GPU, what is free and what PyTorch holds unused; in host memory, what Linux could hand out without swapping, or
    what the container's limit leaves, whichever is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    known = [found for found in (_left_on_host(), _left_in_container()) if found is not None]
    return min(known) if device.type == "cpu" and known else None


def return_freed_memory() -> None:
    """Give the system the host memory that was freed and that the C library keeps; tens of milliseconds.

    For processes that compute for hours: glibc keeps freed blocks below 32 MiB, and activations of ever other lengths
    leave holes between them that the next ones do not fit, several GiB in an hour. Other C libraries are left alone.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _left_on_host() -> int | None:
    if not _MEMINFO.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _left_in_container() -> int | None:
    """Return what the limit of control groups (version 2) leaves; None without one."""
    limit, used, statistics = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return None
    # Files in the cache count as used, although they are dropped as soon as the memory is wanted.
    cached = dict(line.split() for line in statistics.read_text().splitlines()).get("inactive_file", 0)
    return max(0, int(most) - int(used.read_text()) + int(cached))
