"""Bias followed by the exact GELU."""

from __future__ import annotations

import torch

from cistron_kernels.bias_gelu import reference
from cistron_kernels.checks import check_floating, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton

__all__ = ["bias_gelu"]


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add a bias and apply the Gaussian error linear unit, by erf and not by its tanh approximation.

    Args:
        x: [..., F], a linear layer's product before its bias.
        bias: [F].

    Returns:
        [..., F] in the dtype of `x`; the arithmetic is fp32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() < 1 or bias.shape != x.shape[-1:]:
        refuse("bias_gelu", "bias must be [F] for x [..., F]", x=x, bias=bias)
    check_floating("bias_gelu", x=x, bias=bias)
    check_same_device("bias_gelu", x=x, bias=bias)
    if takes_triton("bias_gelu", x, bias):
        from cistron_kernels.bias_gelu import kernel

        return kernel.bias_gelu(x, bias)
    return reference.bias_gelu(x, bias)
