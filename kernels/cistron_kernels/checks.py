"""Refuse bad arguments of an op before any kernel starts, with the shapes in the message."""

from __future__ import annotations

from typing import NoReturn

import torch


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


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors hold floating-point numbers."""
    if not all(tensor.is_floating_point() for tensor in tensors.values() if tensor is not None):
        refuse(op, "floating-point numbers are needed", **tensors)
