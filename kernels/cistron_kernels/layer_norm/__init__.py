"""Layer normalisation, alone or with the residual addition before it."""

from __future__ import annotations

from typing import Final

import torch

from cistron_kernels.autocast import product_dtype
from cistron_kernels.checks import check_floating, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.layer_norm import reference

__all__ = ["add_layer_norm", "layer_norm"]

_MOST_COLUMNS: Final = 1 << 13
"""The kernels hold a row in the registers of one program; PyTorch takes wider ones."""


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalise the last dimension to zero mean and unit variance, then scale and shift.

    Args:
        x: [..., H].
        weight: [H] scale.
        bias: [H] shift.
        eps: added to the variance.

    Returns:
        [..., H] in the dtype of `x`, or in autocast's where that is on; the arithmetic is fp32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("layer_norm", x, weight, bias)
    if takes_triton("layer_norm", x, weight, bias) and x.shape[-1] <= _MOST_COLUMNS:
        from cistron_kernels.layer_norm import kernel

        return kernel.layer_norm(x, weight, bias, eps, product_dtype(x))
    return reference.layer_norm(x, weight, bias, eps=eps, dtype=product_dtype(x))


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise the sum, in one pass over memory.

    Args:
        x: [..., H], the layer's output.
        residual: [..., H], the stream before it.
        weight: [H] scale.
        bias: [H] shift.
        eps: added to the variance.

    Returns:
        The normalised sum [..., H] in the dtype of `x`, or in autocast's where that is on; and the sum [..., H] in the
        wider dtype of the two. The sum is rounded before it is normalised.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("add_layer_norm", x, weight, bias, residual)
    if takes_triton("layer_norm", x, residual, weight, bias) and x.shape[-1] <= _MOST_COLUMNS:
        from cistron_kernels.layer_norm import kernel

        return kernel.add_layer_norm(x, residual, weight, bias, eps, product_dtype(x))
    return reference.add_layer_norm(x, residual, weight, bias, eps=eps, dtype=product_dtype(x))


def _check(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    if x.dim() < 1 or not weight.shape == bias.shape == x.shape[-1:]:
        refuse(op, "weight and bias must be [H] for x [..., H]", **tensors)
    if residual is not None and residual.shape != x.shape:
        refuse(op, "residual must have the shape of x", **tensors)
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
