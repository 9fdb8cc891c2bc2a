"""What training asks of a parallel strategy, and the settings that choose one.

Every strategy computes the same thing: the gradient of one scalar, the sum of the scaled losses of all micro-batches of
all ranks. The scale is one over the global weight of the targets, so a rank with few targets counts for what its
targets weigh. Wrappers that average over ranks are undone inside the strategy.

Of a strategy's checkpoints its settings say the folder's name, and whether another number of ranks can read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Protocol, TypeAlias

import torch
from pydantic import Field

from cistron.config import Config
from cistron.parallel.mesh import World
from cistron.parallel.module import Batch, ModelFactory, OptimizerFactory


class Fsdp2Config(Config):
    """Parameters, gradients and optimiser state sharded over all ranks, block by block."""

    checkpoint_folder: ClassVar[str] = "dcp"
    reshards: ClassVar[bool] = True
    kind: Literal["fsdp2"] = "fsdp2"
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass, at the price of gathering them again in the backward."""


class DeepSpeedConfig(Config):
    """DeepSpeed ZeRO."""

    checkpoint_folder: ClassVar[str] = "deepspeed"
    reshards: ClassVar[bool] = False
    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[1, 2, 3] = 2
    """What is sharded: 1 the optimiser's state, 2 gradients too, 3 parameters too."""


class DdpConfig(Config):
    """Every rank holds the whole model."""

    checkpoint_folder: ClassVar[str] = "dcp"
    reshards: ClassVar[bool] = True
    kind: Literal["ddp"] = "ddp"


StrategyConfig: TypeAlias = Annotated[Fsdp2Config | DeepSpeedConfig | DdpConfig, Field(discriminator="kind")]


class PendingSave(Protocol):
    """A checkpoint that is being written."""

    def wait(self) -> None:
        """Return when this rank's part (on rank 0: every part) is in storage; raise what went wrong."""
        ...


class Strategy(Protocol):
    """One model on all ranks. Every method may communicate, so call each on all ranks, equally often."""

    world: World

    def prepare(self, build_model: ModelFactory, build_optimizer: OptimizerFactory) -> None:
        """Build the model, spread it over the ranks, and build its optimiser."""
        ...

    def accumulate(self, batch: Batch, *, scale: float, last: bool) -> torch.Tensor:
        """Run one micro-batch forward and backward, adding the gradient of `scale` times its loss sum.

        Args:
            batch: packed documents on this rank's device.
            scale: one over the global weight of the step's targets, the same on every rank.
            last: whether this is the step's final micro-batch on every rank.

        Returns:
            This rank's scalar fp32 sum of weighted losses, detached.
        """
        ...

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Return this rank's scalar fp32 sum of weighted losses, without gradients."""
        ...

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Return the accumulated, unclipped fp32 gradients by the model's parameter names, on every rank."""
        ...

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update and clear the gradients; return their global norm before clipping, a scalar."""
        ...

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's whole state dict, fp32 master weights on the CPU; iterate to the end on every rank."""
        ...

    def save(self, directory: str) -> PendingSave:
        """Begin to write model and optimiser below `directory`, a path or URL; training may go on meanwhile."""
        ...

    def load(self, directory: str) -> None:
        """Read what ``save`` wrote."""
        ...
