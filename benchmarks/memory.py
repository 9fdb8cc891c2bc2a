"""Resident memory of this process, in bytes, as Linux tells it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int:
    """Return what is in use now."""
    return _status("VmRSS")


def peak() -> int:
    """Return the most since the program began; getrusage's peak would begin with that of the parent process."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
