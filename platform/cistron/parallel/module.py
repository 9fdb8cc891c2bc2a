"""The module that strategies wrap: a model with its loss inside, so that what comes out is one plain tensor.

FSDP2 and ZeRO-3 find the end of a forward pass by the tensors in the wrapped module's output; a scalar leaves no doubt,
a dataclass of logits would. It also keeps the logits from outliving the forward pass.

Mixed precision lives here too, the same for every strategy: parameters, gradients, their sums over ranks and the
optimiser are fp32, and matrix products run in bf16 by autocast. Rounding whole modules to bf16, as the wrappers offer,
would round the poles of HCL filters and rotary frequencies along with the projections.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cistron.models.base import SequenceModel
from cistron_kernels.cross_entropy import cross_entropy

Precision = Literal["bf16", "fp32"]

ModelFactory: TypeAlias = Callable[[torch.device], SequenceModel]
"""Builds the model on a device, weights initialised unless that is the meta device."""

OptimizerFactory: TypeAlias = Callable[[SequenceModel], torch.optim.Optimizer]
"""Builds the optimiser of a model whose parameters may already be sharded."""


class Batch(Protocol):
    """Packed documents with their targets; T tokens, N documents."""

    @property
    def input_ids(self) -> torch.Tensor:
        """[T] int64."""
        ...

    @property
    def targets(self) -> torch.Tensor:
        """[T] int64, -100 where nothing is predicted."""
        ...

    @property
    def weights(self) -> torch.Tensor:
        """[T] float32."""
        ...

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[N+1] int32, from 0 to T."""
        ...


class LossModule(nn.Module):
    """A model and its cross-entropy.

    Attributes:
        model: computes the logits of packed documents.
        precision: of the matrix products inside the model.
    """

    def __init__(self, model: SequenceModel, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(
        self, input_ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Return the fp32 scalar sum of weight times negative log-likelihood over the targets of a packed batch."""
        low = self.precision == "bf16"
        # Without the cache, a cast weight lives as long as its product, not as long as the whole forward pass.
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False):
            # `.forward` instead of a call: hooks that wrappers put on the inner model would not understand its output.
            output = self.model.forward(input_ids, cu_seqlens=cu_seqlens)
        loss_sum, _ = cross_entropy(output.logits, targets, weights)
        return loss_sum


def recompute_blocks(model: SequenceModel) -> SequenceModel:
    """Keep only each block's input for the backward pass and compute its inside again there.

    The method is replaced rather than the module, so that parameter names stay the checkpoint's.
    """
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model
