"""The product of a gate and a value; Evo 2's gate is a GELU in the first layer and plain afterwards."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch.nn import functional

Activation: TypeAlias = Literal["identity", "gelu"]


def glu(gate: torch.Tensor, value: torch.Tensor, *, activation: Activation) -> torch.Tensor:
    """Return ``activation(gate) * value``, elementwise.

    Args:
        gate: [..., F].
        value: [..., F].
        activation: ``gelu`` is the exact one, by erf; ``identity`` makes the unit bilinear.
    """
    return (functional.gelu(gate) if activation == "gelu" else gate) * value
