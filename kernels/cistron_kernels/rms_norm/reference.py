"""Root-mean-square normalisation, in the two forms that Evo 2 code uses: eps outside or inside the root."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool) -> torch.Tensor:
    """Scale the last dimension to unit root mean square, then by `weight`.

    Args:
        x: [..., H].
        weight: [H].
        eps: guards the division.
        eps_inside: add `eps` to the mean square (training) instead of to its root (vortex).

    Returns:
        [..., H] in the dtype of `x`; the arithmetic is fp32 or better.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps_inside:
        scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    else:
        # The norm's own derivative is defined at a row of zeros; that of sqrt(mean square) is not.
        root_mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * wide.shape[-1] ** -0.5
        scale = 1.0 / (root_mean_square + eps)
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised sum of `x` and `residual`, and the sum, both [..., H]."""
    total = x + residual
    return rms_norm(total, weight, eps=eps, eps_inside=eps_inside), total
