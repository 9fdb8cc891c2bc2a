"""What autocast means to an op whose result enters a matrix product."""

from __future__ import annotations

import torch


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that a matrix product would read `x` in: autocast's where it is on, else that of `x`.

    A norm that writes this dtype at once saves every product behind it a copy of its own.
    """
    device = x.device.type
    # Autocast leaves fp64 alone.
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
