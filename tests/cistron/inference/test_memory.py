"""What a process holds after its tensors are freed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

MIB = 1 << 20
FREE_AND_RETURN = """
from pathlib import Path
import torch
from cistron.inference.memory import return_freed_memory

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

return_freed_memory()
before = resident()
blocks = [torch.ones(1 << 18) for _ in range(200)]
last = torch.ones(1 << 18)  # It keeps the heap from shrinking by itself.
del blocks
freed = resident()
return_freed_memory()
print(before, freed, resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_freed_memory_is_returned():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * MIB), "MALLOC_TRIM_THRESHOLD_": str(1024 * MIB)}
    done = subprocess.run(
        [sys.executable, "-c", FREE_AND_RETURN], env=environment, capture_output=True, text=True, check=True
    )
    before, freed, returned = map(int, done.stdout.split())
    assert freed - before > 150 * MIB
    assert returned - before < 50 * MIB
