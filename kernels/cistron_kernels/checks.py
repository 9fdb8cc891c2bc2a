"""Refuse bad arguments of an op before any kernel starts, with the shapes in the message."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NoReturn

import torch

INDEX_DTYPES: Final = (torch.int32, torch.int64)


def refuse(op: str, problem: str, **tensors: torch.Tensor | None) -> NoReturn:
    """Raise the ValueError of an op, describing its tensors.

    Raises:
        ValueError: always.
    """
    described = ", ".join(f"{name} {describe(tensor)}" for name, tensor in tensors.items() if tensor is not None)
    raise ValueError(f"{op}: {problem} (got {described})")


def describe(tensor: torch.Tensor) -> str:
    """Return shape, dtype and device of a tensor, and its strides where it is not contiguous."""
    text = f"[{', '.join(map(str, tensor.shape))}] {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    return text if tensor.is_contiguous() else f"{text} with strides {tuple(tensor.stride())}"


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        refuse(op, "all tensors must be on one device", **tensors)


def check_choice(
    op: str, name: str, value: object, allowed: tuple[str, ...], /, **tensors: torch.Tensor | None
) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        refuse(op, f"{name} must be one of {', '.join(allowed)}, not {value!r}", **tensors)


def can_look_at(tensor: torch.Tensor) -> bool:
    """Return whether its numbers are there without waiting: in host memory, and not while a graph is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_lengths(
    op: str, lengths: torch.Tensor | None, batch: int, length: int, **tensors: torch.Tensor | None
) -> None:
    """Raise ValueError unless lengths are [B] int32 or int64 and, where that is seen without waiting, from 0 to L."""
    if lengths is None:
        return
    if lengths.shape != (batch,) or lengths.dtype not in INDEX_DTYPES:
        refuse(op, "lengths must be [B] whole numbers, int32 or int64", **tensors, lengths=lengths)
    if batch and can_look_at(lengths):
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > length:
            problem = f"lengths must be from 0 to {length}, not from {low} to {high}"
            refuse(op, problem, **tensors, lengths=lengths)


def checked_offsets(op: str, cu_seqlens: torch.Tensor, tokens: int, **tensors: torch.Tensor | None) -> list[int]:
    """Return the offsets as a list; ValueError unless they run from 0 to `tokens` without decreasing."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens or any(b < a for a, b in pairwise(offsets)):
        shown = f"[{', '.join(map(str, offsets[:16]))}{', ...' if len(offsets) > 16 else ''}]"
        problem = f"cu_seqlens must run from 0 to {tokens} without decreasing, not {shown}"
        refuse(op, problem, cu_seqlens=cu_seqlens, **tensors)
    return offsets


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors hold floating-point numbers."""
    if not all(tensor.is_floating_point() for tensor in tensors.values() if tensor is not None):
        refuse(op, "floating-point numbers are needed", **tensors)
