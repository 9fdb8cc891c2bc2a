"""What a process holds after its tensors are freed."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from benchmarks.memory import resident
from benchmarks.timing import in_new_process

from cistron.inference.memory import return_freed_memory

MIB = 1 << 20
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(1024 * MIB)}
"""For glibc: the blocks below come from its heap, and the heap stays when they are freed."""


def held() -> tuple[int, int, int]:
    """Bytes in use before 200 MiB are taken, after they are freed, and after they are returned."""
    return_freed_memory()
    before = resident()
    blocks = [torch.ones(MIB // 4) for _ in range(201)]
    del blocks[:-1]  # The last stays, or the heap would end with what is freed and could shrink by itself.
    freed = resident()
    return_freed_memory()
    return before, freed, resident()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_freed_memory_is_returned():
    before, freed, returned = in_new_process(held, environment=KEPT)
    assert freed - before > 150 * MIB
    assert returned - before < 50 * MIB
