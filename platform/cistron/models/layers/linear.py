"""Linear layers, and the fastest way this machine has to run them.

On CPUs, inference in fp32 goes through oneDNN's inner product: on the processors that were measured it is 5 to 20 %
faster than the BLAS behind ``torch.nn.functional.linear``, and it applies GELU to each tile while that is in cache,
where a separate GELU reads and writes the widest activation of the network once more. The weights stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from cistron_kernels.bias_gelu import bias_gelu


class Linear(nn.Linear):
    """A linear layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class names it so
        """Map [..., inputs] to [..., outputs]."""
        if _runs_on_onednn(input, self.weight):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return functional.linear(input, self.weight, self.bias)


class GeluLinear(nn.Linear):
    """A linear layer followed by the exact GELU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class names it so
        """Map [..., inputs] to [..., outputs]."""
        if _runs_on_onednn(input, self.weight):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "gelu", [], "none")
        return bias_gelu(functional.linear(input, self.weight), self.bias)


def _runs_on_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether oneDNN's inner product applies: it has no gradient, and takes plain fp32 tensors in host memory.

    The operator is the one that torch's own compiler emits for CPUs; a torch built without it takes the other way.
    """
    return (
        not torch.is_grad_enabled()
        and type(weight) is nn.Parameter
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )
