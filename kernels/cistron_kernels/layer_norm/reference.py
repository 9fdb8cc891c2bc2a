"""Layer normalisation with statistics in fp32 or better."""

from __future__ import annotations

import torch
from torch.nn import functional


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalise the last dimension to zero mean and unit variance, then scale and shift.

    Args:
        x: [..., H].
        weight: [H] scale.
        bias: [H] shift.
        eps: added to the variance.
        dtype: of the result; that of `x` if not given. The arithmetic is fp32 or better.

    Returns:
        [..., H].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype or x.dtype)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised sum of `x` and `residual` in `dtype`, that of `x` if not given; and the sum."""
    total = x + residual
    return layer_norm(total, weight, bias, eps=eps, dtype=dtype or x.dtype), total
