"""Rotary position embedding in the half-rotation layout: channel i turns with channel i + D/2."""

from __future__ import annotations

import torch


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
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
