"""Root-mean-square normalisation, in the two forms that Evo 2 code uses: eps outside or inside the root."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Scale the last dimension to unit root mean square, then by `weight`.

    Args:
        x: [..., H].
        weight: [H].
        eps: guards the division.
        eps_inside: add `eps` to the mean square (training) instead of to its root (vortex).
        dtype: of the result; that of `x` if not given. The arithmetic is fp32 or better.

    Returns:
        [..., H].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps_inside:
        scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    else:
        # The norm's own derivative is defined at a row of zeros; that of sqrt(mean square) is not.
        root_mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        scale = 1.0 / (root_mean_square + eps)
    normalised = wide * scale
    if torch.is_grad_enabled() or weight.dtype.itemsize > normalised.dtype.itemsize:
        return (normalised * weight).to(dtype or x.dtype)
    return normalised.mul_(weight).to(dtype or x.dtype)  # New memory costs a CPU half as much as all of this.


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    eps_inside: bool,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised sum of `x` and `residual` in `dtype`, that of `x` if not given; and the sum."""
    total = x + residual
    return rms_norm(total, weight, eps=eps, eps_inside=eps_inside, dtype=dtype or x.dtype), total
