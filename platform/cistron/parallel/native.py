"""What FSDP2 and DDP share: torch optimisers, torch clipping, and distributed checkpoints (DCP).

Both keep plain parameters (or DTensors), so a checkpoint written by one can be read by the other, at any number of
ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from cistron.models.base import SequenceModel
from cistron.parallel.dcp import StorageReader, StorageWriter
from cistron.parallel.mesh import World
from cistron.parallel.module import Batch, ModelFactory, OptimizerFactory, Precision


class NativeStrategy(ABC):
    """A strategy whose optimiser is torch's own."""

    def __init__(self, *, world: World, precision: Precision, grad_clip: float | None) -> None:
        self.world = world
        self._precision = precision
        self._grad_clip = grad_clip
        self._wrapped: nn.Module
        self._model: SequenceModel
        self._optimizer: torch.optim.Optimizer
        self._save_group: dist.ProcessGroup | None = None

    @abstractmethod
    def _wrap(self, build_model: ModelFactory) -> tuple[SequenceModel, nn.Module]:
        """Return the model and the module whose call computes the loss over all ranks."""

    def prepare(self, build_model: ModelFactory, build_optimizer: OptimizerFactory) -> None:
        """See :meth:`Strategy.prepare`."""
        self._model, self._wrapped = self._wrap(build_model)
        self._optimizer = build_optimizer(self._model)
        if dist.is_initialized():
            # Writing happens in a thread beside the training step, whose collectives must not mix with its own.
            self._save_group = dist.new_group(backend="gloo")

    def accumulate(self, batch: Batch, *, scale: float, last: bool) -> torch.Tensor:
        """See :meth:`Strategy.accumulate`."""
        del last
        loss = self._forward(batch)
        # Both wrappers average gradients over the ranks; what is wanted is their sum.
        (loss * (scale * self.world.size)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """See :meth:`Strategy.evaluate`."""
        self._wrapped.eval()
        with torch.no_grad():
            loss = self._forward(batch)
        self._wrapped.train()
        return loss

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """See :meth:`Strategy.full_gradients`."""
        return {
            name: _whole(parameter.grad).float().clone()
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None
        }

    def step(self, learning_rate: float) -> torch.Tensor:
        """See :meth:`Strategy.step`."""
        limit = float("inf") if self._grad_clip is None else self._grad_clip
        norm = _whole(nn.utils.clip_grad_norm_(self._model.parameters(), limit))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See :meth:`Strategy.full_state`."""
        for name, tensor in self._model.state_dict().items():
            yield name, _whole(tensor).detach().cpu()

    def save(self, directory: str) -> DcpSave:
        """See :meth:`Strategy.save`; tensors are copied before this returns, and written in a thread."""
        future = async_save(self._state(), storage_writer=StorageWriter(directory), process_group=self._save_group)
        assert isinstance(future, Future), "only stagers of our own return anything else"
        return DcpSave(future)

    def load(self, directory: str) -> None:
        """See :meth:`Strategy.load`."""
        state = self._state()
        load(state, storage_reader=StorageReader(directory), process_group=self._save_group)
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _forward(self, batch: Batch) -> torch.Tensor:
        return self._wrapped(batch.input_ids, batch.targets, batch.weights, batch.cu_seqlens)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}


class DcpSave:
    """An asynchronous DCP save; rank 0's ends after every rank's, because it writes the metadata."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> None:
        """See :meth:`PendingSave.wait`."""
        self._future.result()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
