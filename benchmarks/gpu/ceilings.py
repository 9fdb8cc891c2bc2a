"""What the GPU reaches in this run: the two rates that everything else is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.budget import Share
from benchmarks.gpu.cases.case import Ceilings
from benchmarks.gpu.context import Context
from benchmarks.gpu.measure import Work
from benchmarks.gpu.report import Row


def run(context: Context, share: Share) -> Iterator[Row]:
    """Measure a copy and a product, and leave both in the context."""
    del share
    plan, clock = context.plan, context.clock
    source = torch.randn(plan.copy_elements, device=plan.device, dtype=torch.bfloat16)
    copied = 2 * source.nbytes / clock.seconds(_copying(source))
    size = plan.gemm_size
    a, b = (torch.randn(size, size, device=plan.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    multiplied = 2.0 * size**3 / clock.seconds(lambda _: partial(torch.mm, a, b, out=product))
    del source
    context.ceilings = Ceilings(copied, multiplied)
    yield Row("ceilings", "copy, read and written", f"{plan.copy_elements:,} bf16", shown=f"{copied / 1e12:.2f} TB/s",
              figures={"bytes_per_s": copied})  # fmt: skip
    yield Row("ceilings", "bf16 product", f"{size} x {size} x {size}", shown=f"{multiplied / 1e12:.0f} TFLOP/s",
              figures={"flops_per_s": multiplied})  # fmt: skip


def _copying(source: torch.Tensor) -> Work:
    target = torch.empty_like(source)
    return lambda _: partial(target.copy_, source)
