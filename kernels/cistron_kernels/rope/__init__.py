"""Rotary position embedding."""

from __future__ import annotations

from typing import Final

import torch

from cistron_kernels.checks import check_floating, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.rope import reference

__all__ = ["rope", "rope_pair", "rotate", "rotate_pair", "rotation"]


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scaling: float = 1.0) -> torch.Tensor:
    """Rotate each pair of channels by its position's angle.

    Angles and the rotation are fp32 whatever the input's dtype: in bf16 the angle of position 1,000 is off by radians.

    Args:
        x: [..., L, A, D] queries or keys; D is even. Only the last dimension must be contiguous.
        positions: [..., L] integer positions, broadcast against the leading dimensions of `x`.
        inv_freq: [D/2] radians per position.
        scaling: positions are divided by it (linear position interpolation).

    Returns:
        [..., L, A, D] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_positions("rope", x, None, positions, inv_freq, scaling)
    if _takes_triton(x, inv_freq, positions=positions):
        from cistron_kernels.rope import kernel

        return kernel.rope([x], positions, inv_freq, scaling, False)[0]
    return reference.rope(x, positions, inv_freq, scaling=scaling)


def rope_pair(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys as `rope` does, in one pass over memory.

    Args:
        q: [..., L, A, D].
        k: [..., L, A, D], of the dtype of `q`; both may be slices of one fused projection.
        positions: as in `rope`.
        inv_freq: as in `rope`.
        scaling: as in `rope`.

    Returns:
        The rotated queries and keys.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_positions("rope_pair", q, k, positions, inv_freq, scaling)
    if _takes_triton(q, inv_freq, positions=positions):
        from cistron_kernels.rope import kernel

        rotated_q, rotated_k = kernel.rope([q, k], positions, inv_freq, scaling, False)
        return rotated_q, rotated_k
    return reference.rope_pair(q, k, positions, inv_freq, scaling=scaling)


def rotation(
    positions: torch.Tensor, inv_freq: torch.Tensor, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and the sine of every angle, for layers that share their positions.

    Args:
        positions: [..., L] integer positions.
        inv_freq: [D/2] radians per position.
        scaling: positions are divided by it.

    Returns:
        Two of [..., L, 1, D/2], fp32.
    """
    return reference.rotation(positions, inv_freq, scaling=scaling)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels by the angle whose cosine and sine are given.

    Args:
        x: [..., L, A, D] queries or keys.
        cos: [..., L, 1, D/2], broadcast against the leading dimensions of `x`.
        sin: as `cos`.

    Returns:
        [..., L, A, D] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_rotation("rotate", x, None, cos, sin)
    if _takes_triton(x, cos, sin):
        from cistron_kernels.rope import kernel

        return kernel.rotate([x], cos, sin, False)[0]
    return reference.rotate(x, cos, sin)


def rotate_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys as `rotate` does, in one pass over memory.

    Args:
        q: [..., L, A, D].
        k: [..., L, A, D], of the dtype of `q`; both may be slices of one fused projection.
        cos: as in `rotate`.
        sin: as in `rotate`.

    Returns:
        The rotated queries and keys.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check_rotation("rotate_pair", q, k, cos, sin)
    if _takes_triton(q, cos, sin):
        from cistron_kernels.rope import kernel

        rotated_q, rotated_k = kernel.rotate([q, k], cos, sin, False)
        return rotated_q, rotated_k
    return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)


_INTEGERS: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _takes_triton(x: torch.Tensor, *angles: torch.Tensor, positions: torch.Tensor | None = None) -> bool:
    """Return whether kernels run; they have no gradient of the angles."""
    if not takes_triton("rope", x, *angles) or any(tensor.requires_grad for tensor in angles):
        return False
    return positions is None or positions.device == x.device


def _check_positions(
    op: str,
    x: torch.Tensor,
    other: torch.Tensor | None,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: float,
) -> None:
    tensors = {"x" if other is None else "q": x, "k": other, "positions": positions, "inv_freq": inv_freq}
    _check_heads(op, x, other, tensors)
    if inv_freq.dim() != 1 or x.shape[-1] != 2 * inv_freq.shape[0]:
        refuse(op, "inv_freq must be [D/2] for x [..., L, A, D]", **tensors)
    if positions.dtype not in _INTEGERS or not _broadcasts(positions.shape, x.shape[:-2]):
        refuse(op, "positions must be integers [..., L] that broadcast to x [..., L, A, D]", **tensors)
    if not scaling > 0:
        refuse(op, f"scaling must be positive, not {scaling}", **tensors)


def _check_rotation(op: str, x: torch.Tensor, other: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
    tensors = {"x" if other is None else "q": x, "k": other, "cos": cos, "sin": sin}
    _check_heads(op, x, other, tensors)
    if cos.shape != sin.shape or cos.dim() < 3 or cos.shape[-2] != 1 or x.shape[-1] != 2 * cos.shape[-1]:
        refuse(op, "cos and sin must be [..., L, 1, D/2] for x [..., L, A, D]", **tensors)
    if not _broadcasts(cos.shape[:-2], x.shape[:-2]):
        refuse(op, "cos and sin must broadcast to x [..., L, A, D]", **tensors)


def _check_heads(op: str, x: torch.Tensor, other: torch.Tensor | None, tensors: dict[str, torch.Tensor | None]) -> None:
    if x.dim() < 3 or x.shape[-1] % 2:
        refuse(op, "x must be [..., L, A, D] with an even D", **tensors)
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        refuse(op, "q and k must have one shape and dtype", **tensors)
    check_floating(op, **{name: tensor for name, tensor in tensors.items() if name != "positions"})
    check_same_device(op, **tensors)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Return whether the shape expands to another, which ends in L."""
    if len(shape) > len(to) or not shape or shape[-1] != to[-1]:
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
