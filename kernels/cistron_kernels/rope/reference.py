"""Rotary position embedding in the half-rotation layout: channel i turns with channel i + D/2."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scaling: float = 1.0) -> torch.Tensor:
    """Rotate each pair of channels by its position's angle.

    Angles and the rotation are fp32 whatever the input's dtype: in bf16 the angle of position 1,000 is off by radians.

    Args:
        x: [..., L, A, D] queries or keys; D is even.
        positions: [..., L] integer positions, broadcast against the leading dimensions of `x`.
        inv_freq: [D/2] radians per position.
        scaling: positions are divided by it (linear position interpolation).

    Returns:
        [..., L, A, D] in the dtype of `x`.
    """
    return rotate(x, *rotation(positions, inv_freq, scaling=scaling))


def rope_pair(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by angles that are worked out once."""
    shared = rotation(positions, inv_freq, scaling=scaling)
    return rotate(q, *shared), rotate(k, *shared)


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
    angles = (positions.float() / scaling)[..., None, None] * inv_freq.float()
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of channels by the angle whose cosine and sine are given.

    Args:
        x: [..., L, A, D] queries or keys.
        cos: [..., L, 1, D/2], broadcast against the leading dimensions of `x`.
        sin: as `cos`.

    Returns:
        [..., L, A, D] in the dtype of `x`.
    """
    rotated: torch.Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """The rotation; its gradient is the rotation back, for which `x` need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate x [..., L, A, D]; cosine and sine are constants."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Rotate the gradient by the opposite angles."""
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn both halves in the memory of one product: joining them would read and write everything once more."""
    halves = x.float().view(*x.shape[:-1], 2, x.shape[-1] // 2)
    rotated = halves * cos[..., None, :]
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin)
    return rotated.flatten(-2).to(x.dtype)
