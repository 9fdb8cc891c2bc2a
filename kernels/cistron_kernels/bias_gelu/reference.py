"""Bias followed by the exact GELU: the error function, not the tanh approximation."""

from __future__ import annotations

import torch
from torch.nn import functional


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add a bias and apply the Gaussian error linear unit.

    Args:
        x: [..., F], a linear layer's product before its bias.
        bias: [F].

    Returns:
        [..., F] in the dtype of `x`; the arithmetic is fp32.
    """
    return functional.gelu(x.float() + bias.float(), approximate="none").to(x.dtype)
