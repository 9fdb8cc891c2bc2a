"""FSDP2: every parameter is a DTensor sharded over all ranks, gathered block by block when it is needed.

The model is laid out on the meta device first, so that no rank ever holds more than its shards on its device. Rank 0
builds the initialised weights in host memory and hands them round.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from cistron.models.base import SequenceModel
from cistron.parallel.mesh import World
from cistron.parallel.module import LossModule, ModelFactory, Precision
from cistron.parallel.native import NativeStrategy
from cistron.parallel.strategy import Fsdp2Config


class Fsdp2Strategy(NativeStrategy):
    """Torch's ``fully_shard`` on each block, then on the whole."""

    def __init__(self, config: Fsdp2Config, *, world: World, precision: Precision, grad_clip: float | None) -> None:
        super().__init__(world=world, precision=precision, grad_clip=grad_clip)
        self._config = config

    def _wrap(self, build_model: ModelFactory) -> tuple[SequenceModel, nn.Module]:
        model = build_model(torch.device("meta"))
        module = LossModule(model, self._precision).train()
        self._shard(module, self.world.mesh())
        module.to_empty(device=self.world.device)
        self._fill(model, build_model(torch.device("cpu")) if self.world.is_main else None)
        return model, module

    def _shard(self, module: LossModule, mesh: DeviceMesh) -> None:
        for block in module.model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self._config.reshard_after_forward)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)

    def _fill(self, model: SequenceModel, source: SequenceModel | None) -> None:
        """Give every rank its shards of rank 0's weights, and whole copies of its buffers."""
        set_model_state_dict(
            model,
            source.state_dict() if source is not None else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        buffers = dict(source.named_buffers()) if source is not None else {}
        for name, buffer in model.named_buffers():
            if source is not None:
                buffer.copy_(buffers[name])
            if dist.is_initialized():
                dist.broadcast(buffer, src=0)
