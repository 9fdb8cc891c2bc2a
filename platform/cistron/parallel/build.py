"""From a strategy's settings to the strategy; DeepSpeed is imported only by runs that use it."""

from __future__ import annotations

from cistron.parallel.ddp import DdpStrategy
from cistron.parallel.fsdp2 import Fsdp2Strategy
from cistron.parallel.mesh import World
from cistron.parallel.module import Precision
from cistron.parallel.strategy import DdpConfig, Fsdp2Config, Strategy, StrategyConfig


def build_strategy(config: StrategyConfig, *, world: World, precision: Precision, grad_clip: float | None) -> Strategy:
    """Return the strategy that `config` describes.

    Args:
        config: which strategy, and its options.
        world: this process among its peers.
        precision: of the matrix products; weights, gradients and their sums are always fp32.
        grad_clip: largest global gradient norm, or None.
    """
    if isinstance(config, Fsdp2Config):
        return Fsdp2Strategy(config, world=world, precision=precision, grad_clip=grad_clip)
    if isinstance(config, DdpConfig):
        return DdpStrategy(world=world, precision=precision, grad_clip=grad_clip)
    from cistron.parallel.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(config, world=world, precision=precision, grad_clip=grad_clip)
