"""What the sections share."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.cases.case import Ceilings
from benchmarks.gpu.measure import Clock
from benchmarks.gpu.plan import Plan


@dataclass
class Context:
    """The run so far.

    Attributes:
        plan: sizes and times.
        clock: measures.
        ceilings: of this run; unmeasured ones make every share of them 0.
        failed: why each case that must not be timed failed its check.
    """

    plan: Plan
    clock: Clock
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(math.inf, math.inf))
    failed: dict[str, str] = field(default_factory=dict)

    def free(self) -> None:
        """Give back the device's memory that nothing holds any more."""
        if self.plan.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
