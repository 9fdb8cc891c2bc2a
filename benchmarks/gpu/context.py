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
        passed: cases whose outputs and gradients were checked and are right; nothing else may be timed.
    """

    plan: Plan
    clock: Clock
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(math.inf, math.inf))
    passed: set[str] = field(default_factory=set)

    def withheld(self, *names: str) -> str:
        """Return why what runs these cases must not be timed: some did not pass. Empty where all did."""
        missing = [name for name in names if name not in self.passed]
        return f"not timed: no check was passed by {'; '.join(missing)}" if missing else ""

    def free(self) -> None:
        """Give back the device's memory that nothing holds any more."""
        if self.plan.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
