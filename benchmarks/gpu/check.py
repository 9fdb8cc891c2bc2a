"""Whether an op computes what its definition says, on the device that it is about to be timed on.

Inputs are drawn in the dtype of the check, and the reference runs on the same numbers in fp64, so that only the op's
own rounding is seen. What kernels allocate is filled with NaN first. Half precision must stay within a fixed error and
within one and a half times the error of plain PyTorch in the same dtype; an error far below the fixed one is not
compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Case, Draw, Shape, Tensors, leaves, relative_error, results
from benchmarks.gpu.plan import Plan
from cistron_kernels.dispatch import override

TOLERANCES: Final = {torch.bfloat16: (5e-3, 1e-2), torch.float32: (1e-5, 1e-4)}
"""Largest relative errors by norm, forward and of gradients."""
TF32: Final = (1e-3, 2e-3)
"""Those of fp32 with products in TF32, which passes under that name."""
RATIO: Final = 1.5
INTERPRETED: Final = 2.0
"""Times the error of a rounded bf16 is that of one cut off, as Triton's interpreter does it."""
NEGLIGIBLE: Final = 0.1
"""Of the tolerance."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Attributes:
        precision: bf16, fp32, or tf32 for what is less exact than fp32 should be.
        layout: of the inputs.
        forward: error of the worst output or state.
        backward: error of the worst gradient; None without one.
        problem: empty where it passed.
    """

    precision: str
    layout: str
    forward: float
    backward: float | None
    problem: str = ""


def check(name: str, plan: Plan) -> list[Finding]:
    """Check a case in both precisions and all layouts; what it raises is a finding, too.

    A rehearsal checks each layout once, the first in bf16.
    """
    case = all_cases()[name]
    shape = Shape(plan.models[case.family][0], *plan.check)
    case.public()
    layouts = list(case.layouts)
    in_bf16, in_fp32 = (layouts[:1], layouts[1:]) if plan.rehearsal else (layouts, layouts)
    return [
        *(_guarded(case, shape, plan, torch.bfloat16, layout) for layout in in_bf16),
        *(_guarded(case, shape, plan, torch.float32, layout) for layout in in_fp32),
    ]


def run_ours(case: Case, tensors: Tensors) -> list[torch.Tensor]:
    """Return outputs, states and gradients of the Triton form."""
    with override("triton"):
        return _everything(case, case.public(), tensors)[0]


def _guarded(case: Case, shape: Shape, plan: Plan, dtype: torch.dtype, layout: str) -> Finding:
    try:
        return _check(case, shape, plan, dtype, layout)
    except Exception as error:
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        return Finding(precision, layout, math.inf, None, f"{type(error).__name__}: {error}"[:300])


def _check(case: Case, shape: Shape, plan: Plan, dtype: torch.dtype, layout: str) -> Finding:
    tensors = case.layouts[layout](case.inputs(shape, Draw(plan.device, dtype)))
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    function = case.public()
    with override("torch"):
        want, count = _everything(case, function, wide)
        plain, _ = _everything(case, function, tensors)
    with override("triton"), _poisoned(), _Launches() as launches:
        got, _ = _everything(case, function, tensors)
        again, _ = _everything(case, function, tensors)
    errors, plain_errors = ([relative_error(a, b) for a, b in zip(found, want, strict=True)] for found in (got, plain))
    forward, backward = max(errors[:count]), max(errors[count:], default=None)
    if plan.rehearsal:
        # So few numbers do not tell whose rounding is better, and the interpreter cuts where a GPU rounds.
        errors, plain_errors = [error / INTERPRETED for error in errors], errors
    precision, problem = _judged(dtype, errors, plain_errors, count)
    if not problem and not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        problem = "two runs differ in their bits"
    if not problem and not launches.names and not (case.imported and dtype != torch.float32):
        problem = "no kernel of ours ran"
    return Finding(precision, layout, forward, backward, problem)


def _everything(case: Case, function: Callable[..., Any], tensors: Tensors) -> tuple[list[torch.Tensor], int]:
    """Return outputs and states, then gradients; and how many are the former."""
    inputs = leaves(tensors, case.gradients)
    inputs |= {name: inputs[name].clone() for name in case.states}
    found = results(function(**inputs, **case.options))
    gradients: tuple[torch.Tensor, ...] = ()
    if case.gradients:
        above = random_cotangents(found[: case.outputs])
        gradients = torch.autograd.grad(found[: case.outputs], [inputs[name] for name in case.gradients], above)
    outputs = [output.detach() for output in found] + [inputs[name] for name in case.states]
    return [*outputs, *gradients], len(outputs)


def random_cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return gradients from above: numbers that bf16 holds exactly, the same ones at each call."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return [
        torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.bfloat16).to(y.dtype) for y in outputs
    ]


def _judged(dtype: torch.dtype, errors: list[float], plain: list[float], count: int) -> tuple[str, str]:
    """Return the precision that was reached, and what is wrong."""
    precision, tolerances = ("bf16", TOLERANCES[dtype]) if dtype == torch.bfloat16 else ("fp32", TOLERANCES[dtype])
    allowed = [tolerances[0]] * count + [tolerances[1]] * (len(errors) - count)
    if dtype == torch.float32 and any(error > limit for error, limit in zip(errors, allowed, strict=True)):
        precision, allowed = "tf32", [TF32[0]] * count + [TF32[1]] * (len(errors) - count)
    for i, (error, other, limit) in enumerate(zip(errors, plain, allowed, strict=True)):
        what = f"output {i}" if i < count else f"gradient {i - count}"
        if not error <= limit:
            return precision, f"{what} is off by {error:.1e} (allowed {limit:.0e})"
        if precision == "bf16" and error > max(RATIO * other, NEGLIGIBLE * limit):
            return precision, f"{what} is off by {error:.1e}, plain PyTorch by {other:.1e}"
    return precision, ""


class _Launches(TorchDispatchMode):
    """Notes which of our operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == "cistron":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let torch fill what is allocated with NaN: its deterministic mode does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
