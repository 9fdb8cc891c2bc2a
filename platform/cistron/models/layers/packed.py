"""Multiply a few rows on a CPU at the speed of reading the weights.

A matrix library reorders a weight before it multiplies more than one row, every time. For the eight rows of a small
batch that costs as much again as the product, so whoever multiplies by the same weights many times reorders them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from cistron.models.layers.fp8 import Fp8Projection

MOST_BYTES: Final = 4 << 30
"""Models with larger linear layers keep one copy of their weights and are slower."""


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a model on the CPU use reordered copies of their fp32 weights in this block.

    Where that does not apply (another device or precision, layers above ``MOST_BYTES``, a torch without oneDNN, a block
    of another thread on the same model) the layers stay as they are. Results agree to the rounding of fp32.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain_fp32(module)]
    if sum(layer.weight.nbytes for layer in layers) > MOST_BYTES or not _has_onednn():
        layers = []
    try:
        for layer in layers:
            layer.__dict__["forward"] = _packed(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_plain_fp32(layer: nn.Linear) -> bool:
    """Return whether a layer does what ``nn.Linear`` does, with a weight that can be reordered."""
    if "forward" in layer.__dict__:
        return False
    plain = type(layer).forward is nn.Linear.forward or (isinstance(layer, Fp8Projection) and layer.path is None)
    weight = layer.weight
    return plain and type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _packed(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the layer's forward pass with a reordered weight: the operators that torch's compiler emits for CPUs."""
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def forward(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
        return product

    return forward


def _has_onednn() -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)  # type: ignore[no-untyped-call]
