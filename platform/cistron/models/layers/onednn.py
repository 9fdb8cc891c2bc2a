"""oneDNN's inner product, the fastest way to run a linear layer in fp32 on a CPU that was found here.

Its operators are those that torch's own compiler emits for CPUs; a torch without them takes the usual way. Nothing else
in the package names them. On the processors that were measured the product is 5 to 20 % faster than the BLAS behind
``torch.nn.functional.linear``, and GELU is applied to each tile while that is in cache. A matrix library reorders a
weight before it multiplies more than one row, every time: for the few rows of a decoding step that costs as much again
as the product, so whoever multiplies by the same weights many times reorders them once.
"""

from __future__ import annotations

import torch
from torch import nn

_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")
_LEAST, _LEAST_REORDERED = 1 << 22, 1 << 20
"""Multiplications from which the product gains more than its calls cost, about 15 microseconds."""


def holds(weight: torch.Tensor) -> bool:
    """Return whether oneDNN multiplies by this weight: a plain fp32 parameter in host memory."""
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


def takes(x: torch.Tensor, weight: torch.Tensor, *, is_reordered: bool = False) -> bool:
    """Return whether oneDNN multiplies `x` by this weight: it has no gradient, and does not cast."""
    return (
        not torch.is_grad_enabled()
        and x.numel() * weight.shape[0] >= (_LEAST_REORDERED if is_reordered else _LEAST)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and holds(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False) -> torch.Tensor:
    """Map [..., inputs] to [..., outputs], through the exact GELU if asked.

    Args:
        x: a tensor that :func:`takes` allows.
        weight: [outputs, inputs], or what :func:`reordered` made of it.
        bias: [outputs], if any.
        gelu: whether the GELU follows.
    """
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else ""
    )
    return product


def reordered(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in the order in which it is multiplied; only :func:`linear` reads it."""
    copy: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return copy
