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
    angles = (positions.float() / scaling)[..., None] * inv_freq.float()
    cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
