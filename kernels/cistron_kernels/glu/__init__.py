"""Gated linear unit."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch

from cistron_kernels.checks import check_choice, check_floating, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.glu import reference

__all__ = ["Activation", "glu"]

Activation: TypeAlias = Literal["identity", "gelu"]


def glu(gate: torch.Tensor, value: torch.Tensor, *, activation: Activation) -> torch.Tensor:
    """Return ``activation(gate) * value``, elementwise.

    Args:
        gate: [..., F]; it and `value` may be the halves of one [..., 2F], which are read where they lie.
        value: [..., F], of the dtype of `gate`.
        activation: ``gelu`` is the exact one, by erf; ``identity`` makes the unit bilinear.

    Returns:
        [..., F] in the dtype of `gate`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there is no such activation.
    """
    if gate.shape != value.shape or gate.dtype != value.dtype or gate.dim() < 1:
        refuse("glu", "gate and value must be [..., F] of one shape and dtype", gate=gate, value=value)
    check_choice("glu", "activation", activation, get_args(Activation), gate=gate, value=value)
    check_floating("glu", gate=gate, value=value)
    check_same_device("glu", gate=gate, value=value)
    if takes_triton("glu", gate, value):
        from cistron_kernels.glu import kernel

        return kernel.glu(gate, value, activation == "gelu")
    return reference.glu(gate, value, gelu=activation == "gelu")
