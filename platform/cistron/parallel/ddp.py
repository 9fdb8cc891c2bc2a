"""Distributed data parallel: every rank holds the whole model and gradients are summed bucket by bucket."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cistron.models.base import SequenceModel
from cistron.parallel.module import Batch, LossModule, ModelFactory
from cistron.parallel.native import NativeStrategy


class DdpStrategy(NativeStrategy):
    """Torch's DistributedDataParallel, or the bare module in a world of one."""

    def accumulate(self, batch: Batch, *, scale: float, last: bool) -> torch.Tensor:
        """See :meth:`Strategy.accumulate`; ranks talk at the last micro-batch only."""
        with nullcontext() if last else self._local():
            return super().accumulate(batch, scale=scale, last=last)

    def _wrap(self, build_model: ModelFactory) -> tuple[SequenceModel, nn.Module]:
        model = build_model(self.world.device)
        module = LossModule(model, self._precision).train()
        return model, DistributedDataParallel(module) if self.world.size > 1 else module

    def _local(self) -> AbstractContextManager[None]:
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
