"""What launching a kernel takes: the current device and its size, the type of operands, tiles and how many programs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 turns fused multiply-adds off unless told.

INTERPRETED_MULTIPROCESSORS: Final = 3
"""Stands for the GPU's number in the interpreter; small, so that one program loops over several tiles in tests."""

WARP: Final = 32
"""Threads of a warp."""


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the tensor's GPU; Triton launches on the current one otherwise."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors, which kernels with a fixed number of programs are sized by."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand_dtype(tensor: torch.Tensor) -> tl.dtype:
    """Return the type of matrix operands: the tensor's, but fp32 in the interpreter, which has no bf16 products."""
    if not tensor.is_cuda:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(tensor.dtype, tl.float32)


def row_tile(columns: int, *, per_thread: int) -> dict[str, int]:
    """Return the constants of a program that holds whole rows: rows, columns as a power of 2, and warps.

    Args:
        columns: of a row.
        per_thread: elements of the tile that a thread holds; sets what a program reads at once and its registers.
    """
    width = triton.next_power_of_2(max(columns, 1))
    rows = max(1, 4 * WARP * per_thread // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": max(4, rows * width // (WARP * per_thread))}


def plane_tile(columns: int, *, per_thread: int) -> dict[str, int]:
    """Return the constants of a program that holds a piece of some rows, for ops that work element by element."""
    width = min(triton.next_power_of_2(max(columns, 1)), 1024)
    return {"ROWS": 4 * WARP * per_thread // width, "COLUMNS": width, "num_warps": 4}


def plane(tensor: torch.Tensor) -> torch.Tensor:
    """Return [..., C] as [R, C] with neighbouring columns; rows may lie apart. A copy only where they are uneven."""
    rows = tensor.numel() // max(tensor.shape[-1], 1)
    matrix = tensor.reshape(rows, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def looping_programs(tensor: torch.Tensor, tiles: int, *, num_warps: int) -> int:
    """Return how many programs share out a number of tiles: as many as fill a GPU with 16 warps per multiprocessor.

    More would leave more partial sums to write and to add up; fewer would leave memory idle.
    """
    return max(1, min(tiles, max(1, 16 // num_warps) * num_multiprocessors(tensor.device)))


def prefetch_stages(tile_bytes: int) -> int:
    """Return the stages of a loop that fetches tiles of so many bytes ahead of their use, two if 48 KiB hold them."""
    return 1 + min(2, 48 * 1024 // max(tile_bytes, 1))
