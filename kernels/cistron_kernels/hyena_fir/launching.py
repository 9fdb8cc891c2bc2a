"""What a launch of the finite filters' kernels needs: a grid, arguments and constants."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cistron_kernels.launch import num_multiprocessors, operand_dtype

TOKENS = 64
"""Of a chunk. Three chunks hold the window of 128 taps, two that of 7."""
PROJECTION_TAPS = 3
FORWARD_ROWS, BACKWARD_ROWS = 32, 16
"""Of a tile: backward, a thread's registers hold the gradients of the filter as well."""
FORWARD_WAVES, BACKWARD_WAVES = 8, 4
"""Programs per multiprocessor, from which on programs take longer stretches."""

_MOST_CHANNELS = 16
_MOST_STEPS = 32
_FP32_SHARED = 213 << 10
"""Bytes of shared memory that fp32 operands, each in two parts, need."""


def fits(x: Tensor) -> bool:
    """Return whether the GPU has room for the kernels' operands."""
    if not x.is_cuda or x.dtype != torch.float32:
        return True
    shared: int = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0)
    return shared >= _FP32_SHARED


def plan(x: Tensor, channels: int, groups: int, rows: int, waves: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, and a program's share: the longest stretches that leave `waves` programs per multiprocessor."""
    width = min(_MOST_CHANNELS, triton.next_power_of_2(channels // groups))
    tiles = groups * triton.cdiv(channels // groups, width)
    chunks, together = triton.cdiv(x.shape[2], TOKENS), rows // width
    spare = chunks * tiles * x.shape[0] // (together * waves * num_multiprocessors(x.device))
    steps = min(_MOST_STEPS, 1 << max(spare.bit_length() - 1, 0))
    stretches = triton.cdiv(chunks, together * steps)
    share = {"steps": steps, "stretches": stretches, "STRETCHES": together, "CHANNELS": width, "TOKENS": TOKENS}
    return (tiles * stretches, x.shape[0]), share


def inputs(
    x: Tensor,
    projection_taps: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    projection_history: Tensor | None,
    history: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the tensors that both kernels read, in their order; x stands in where there is none."""
    if projection_history is not None:
        projection_history = projection_history.to(x.dtype)
    given = (projection_history, projection_taps, history, taps, skip)
    return x, *(x if tensor is None else tensor.contiguous() for tensor in given)


def constants(
    x: Tensor, projection_taps: Tensor | None, skip: Tensor | None, history: Tensor | None, impulse: bool, width: int
) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    return {
        "GATED": projection_taps is not None,
        "SKIP": skip is not None,
        "HISTORY": history is not None,
        "IMPULSE": impulse,
        "BLOCKS": 2 if width <= TOKENS + 1 else 3,
        "GROUP": 16 // x.element_size(),
        "OPERAND": operand_dtype(x),
        "PRECISION": "tf32x3",  # Of fp32 operands; others are taken as they are.
        "num_warps": 8 if x.dtype == torch.float32 else 4,  # fp32 needs twice the registers.
        "num_stages": 1,
    }
