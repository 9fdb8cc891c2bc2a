"""Root-mean-square normalisation, alone or with the residual addition before it."""

from __future__ import annotations

from typing import Final

import torch

from cistron_kernels.autocast import product_dtype
from cistron_kernels.checks import check_floating, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]

_MOST_COLUMNS: Final = 1 << 13
"""The kernels hold a row in the registers of one program; PyTorch takes wider ones."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool) -> torch.Tensor:
    """Scale the last dimension to unit root mean square, then by `weight`.

    Args:
        x: [..., H].
        weight: [H].
        eps: guards the division.
        eps_inside: add `eps` to the mean square (training) instead of to its root (vortex).

    Returns:
        [..., H] in the dtype of `x`, or in autocast's where that is on; the arithmetic is fp32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("rms_norm", x, weight)
    if takes_triton("rms_norm", x, weight) and x.shape[-1] <= _MOST_COLUMNS:
        from cistron_kernels.rms_norm import kernel

        return kernel.rms_norm(x, weight, eps, eps_inside, product_dtype(x))
    return reference.rms_norm(x, weight, eps=eps, eps_inside=eps_inside, dtype=product_dtype(x))


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, eps_inside: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise the sum, in one pass over memory.

    Args:
        x: [..., H], the layer's output.
        residual: [..., H], the stream before it.
        weight: [H].
        eps: as in `rms_norm`.
        eps_inside: as in `rms_norm`.

    Returns:
        The normalised sum [..., H] in the dtype of `x`, or in autocast's where that is on; and the sum [..., H] in the
        wider dtype of the two. The sum is rounded before it is normalised.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("add_rms_norm", x, weight, residual)
    if takes_triton("rms_norm", x, residual, weight) and x.shape[-1] <= _MOST_COLUMNS:
        from cistron_kernels.rms_norm import kernel

        return kernel.add_rms_norm(x, residual, weight, eps, eps_inside, product_dtype(x))
    return reference.add_rms_norm(x, residual, weight, eps=eps, eps_inside=eps_inside, dtype=product_dtype(x))


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> None:
    tensors = {"x": x, "residual": residual, "weight": weight}
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        refuse(op, "weight must be [H] for x [..., H]", **tensors)
    if residual is not None and residual.shape != x.shape:
        refuse(op, "residual must have the shape of x", **tensors)
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
