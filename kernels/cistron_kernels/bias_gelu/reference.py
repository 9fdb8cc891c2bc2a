"""Bias followed by the exact GELU: the error function, not the tanh approximation."""

from __future__ import annotations

import torch
from torch.nn import functional


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the GELU of x [..., F] plus bias [F] in the dtype of `x`; the arithmetic is fp32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.gelu(x.to(wide) + bias.to(wide), approximate="none").to(x.dtype)
