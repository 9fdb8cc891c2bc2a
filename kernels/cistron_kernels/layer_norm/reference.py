"""Layer normalisation with fp32 statistics."""

from __future__ import annotations

import torch
from torch.nn import functional


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalise the last dimension to zero mean and unit variance, then scale and shift.

    Args:
        x: [..., H].
        weight: [H] scale.
        bias: [H] shift.
        eps: added to the variance.

    Returns:
        [..., H] in the dtype of `x`; the arithmetic is fp32.
    """
    return functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
