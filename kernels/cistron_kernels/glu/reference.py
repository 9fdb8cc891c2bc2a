"""The product of a gate and a value; Evo 2's gate is a GELU in the first layer and plain afterwards."""

from __future__ import annotations

import torch
from torch.nn import functional


def glu(gate: torch.Tensor, value: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """Return gate [..., F], or its GELU, times value [..., F]."""
    if gelu and not torch.is_grad_enabled():
        return functional.gelu(gate).mul_(value)  # New memory costs a CPU more than the product.
    return (functional.gelu(gate) if gelu else gate) * value
