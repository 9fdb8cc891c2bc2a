"""Linear layers, each run the fastest way that this machine has (:mod:`cistron.models.layers.onednn`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Final

import torch
from torch import nn
from torch.nn import functional

from cistron.models.layers import onednn
from cistron_kernels.bias_gelu import bias_gelu

MOST_BYTES: Final = 4 << 30
"""Models with larger linear layers keep one copy of their weights and are slower."""


class Linear(nn.Linear):
    """A linear layer; it saves, loads and trains as torch's own."""

    gelu: ClassVar[bool] = False
    """Whether the exact GELU follows."""
    reordered: torch.Tensor | None = None
    """The weight in oneDNN's order, within :func:`reordered_weights`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class names it so
        """Map [..., inputs] to [..., outputs]."""
        if self._runs_on_onednn(input):
            weight = self.weight if self.reordered is None else self.reordered
            return onednn.linear(input, weight, self.bias, gelu=self.gelu)
        return functional.linear(input, self.weight, self.bias)

    def _runs_on_onednn(self, x: torch.Tensor) -> bool:
        return onednn.takes(x, self.weight, is_reordered=self.reordered is not None)

    @property
    def multiplies_by_weight(self) -> bool:
        """Whether the product is that of the weight itself, and not of something made from it."""
        return True


class GeluLinear(Linear):
    """A linear layer followed by the exact GELU."""

    gelu: ClassVar[bool] = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class names it so
        """Map [..., inputs] to [..., outputs]."""
        if self._runs_on_onednn(input):
            return super().forward(input)
        return bias_gelu(functional.linear(input, self.weight), self.bias)


@contextmanager
def reordered_weights(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a model on the CPU use reordered copies of their fp32 weights in this block.

    Worth its while where few rows at a time are multiplied many times, as in decoding. Where it does not apply (another
    device or precision, layers above ``MOST_BYTES``, a torch without oneDNN, a block of another thread on the same
    model) the layers stay as they are. Results agree to the rounding of fp32.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and _can_reorder(module)]
    if sum(layer.weight.nbytes for layer in layers) > MOST_BYTES:
        layers = []
    try:
        for layer in layers:
            layer.reordered = onednn.reordered(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.reordered = None


def _can_reorder(layer: Linear) -> bool:
    return layer.reordered is None and layer.multiplies_by_weight and onednn.holds(layer.weight)
