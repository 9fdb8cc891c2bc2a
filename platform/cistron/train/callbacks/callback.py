"""The moments of a run at which something may happen, and what is known then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cistron.parallel.mesh import World
from cistron.parallel.strategy import Strategy
from cistron.train.config import PretrainConfig
from cistron.train.metrics import Metrics


@dataclass(slots=True)
class Run:
    """A run in progress, on one rank; the loop moves it on.

    Attributes:
        config: all settings.
        world: this process among its peers.
        strategy: the model, its optimiser, and how they are spread.
        step: optimiser steps done.
        cursor: samples consumed over all ranks.
        tokens: tokens trained on over all ranks.
    """

    config: PretrainConfig
    world: World
    strategy: Strategy
    step: int = 0
    cursor: int = 0
    tokens: int = 0


class Callback:
    """Does nothing at every moment; override some. Every rank calls every method."""

    def on_start(self, run: Run) -> None:
        """Run before the first step, after a checkpoint was loaded."""

    def on_step(self, run: Run) -> None:
        """Run after each step."""

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Run every ``log_every`` steps."""

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Run after held-out samples were scored."""

    def on_end(self, run: Run) -> None:
        """Run after the last step."""
