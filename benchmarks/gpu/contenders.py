"""The forms of an op that are timed: ours, plain PyTorch, what torch.compile makes of that, and other libraries'.

Whatever is not the op's own work (drawing inputs, copying what would be overwritten) happens before the clock starts. A
form whose output is not that of plain PyTorch has no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.gpu.budget import Allowance
from benchmarks.gpu.cases.case import Case, Draw, Peer, Shape, Tensors, leaves, relative_error, results
from benchmarks.gpu.check import random_cotangents
from benchmarks.gpu.context import Context
from cistron_kernels.dispatch import Backend, override

SAME: Final = 2e-2
"""Largest difference, by norm, between two right results in bf16."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of both passes, or why there are none."""

    forward: float = 0.0
    backward: float | None = None
    problem: str = ""

    @property
    def whole(self) -> float:
        """Seconds of both."""
        return self.forward + (self.backward or 0.0)


def on(backend: Backend, case: Case, *ops: str) -> Callable[..., Any]:
    """Return the op with all ops, or the named ones, on one backend."""
    return _forced(backend, partial(case.public(), **case.options), *ops)


def compiled(case: Case, compiler: str) -> Callable[..., Any]:
    """Return what torch.compile makes of the op in plain PyTorch.

    What was compiled before is forgotten first: past a number of versions of one function, torch.compile runs it as it
    stands and only warns.
    """
    torch.compiler.reset()
    return _forced("torch", partial(torch.compile(case.public(), backend=compiler, dynamic=False), **case.options))


def _forced(backend: Backend, function: Callable[..., Any], *ops: str) -> Callable[..., Any]:
    def call(**tensors: torch.Tensor) -> Any:
        with override(backend, *ops):
            return function(**tensors)

    return call


def contenders(
    context: Context, case: Case, shape: Shape, compiling: Allowance | None
) -> dict[str, Callable[[], Times]]:
    """Return what measures each form of a case, by its name; that of torch.compile only with time to compile it."""
    timed = partial(times, context, case, shape)
    found: dict[str, Callable[[], Times]] = {
        "ours": lambda: timed(on("triton", case)),
        "torch": lambda: timed(on("torch", case), compared=False),
        **{peer.name: partial(_peer_times, context, case, shape, peer) for peer in case.peers},
    }
    if case.imported:
        found["our kernels"] = lambda: timed(on("triton", case, case.op))
    if compiling is not None:
        found["compiled"] = partial(_compiled_times, context, case, shape, compiling)
    return {name: partial(_guarded, measure) for name, measure in found.items()}


def times(
    context: Context,
    case: Case,
    shape: Shape,
    function: Callable[..., Any],
    peer: Peer | None = None,
    *,
    compared: bool = True,
) -> Times:
    """Measure one form of a case; raise where its output is not that of plain PyTorch."""
    tensors = case.timed_inputs(shape, Draw(context.plan.device, torch.bfloat16))
    sets = [peer.adapt(inputs) if peer else inputs for inputs in (tensors, *_further(context, case, shape, tensors))]

    def prepared(i: int) -> Callable[[], list[torch.Tensor]]:
        inputs = sets[i % len(sets)]
        if peer and peer.in_place:
            inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        given = leaves(inputs, case.gradients)
        return lambda: results(function(**given))

    if compared:
        _compare(case, tensors, prepared(0))
    forward = context.clock.seconds(prepared)
    if not case.gradients:
        return Times(forward)
    above = random_cotangents(prepared(0)()[: case.outputs])
    return Times(forward, context.clock.seconds(lambda i: partial(_gradient, case, prepared(i)(), above)))


def one_pass(case: Case, function: Callable[..., Any], tensors: Tensors) -> list[torch.Tensor]:
    """Run a case forward and, where it has one, backward; return its outputs."""
    outputs = results(function(**leaves(tensors, case.gradients)))
    if case.gradients:
        _gradient(case, outputs, random_cotangents(outputs))
    return outputs


def _further(context: Context, case: Case, shape: Shape, first: Tensors) -> list[Tensors]:
    """Return more inputs like the first ones, as many as it takes to rotate over."""
    count = context.clock.num_sets(sum(tensor.nbytes for tensor in first.values()))
    draws = (Draw(context.plan.device, torch.bfloat16, seed=seed) for seed in range(1, count))
    return [case.timed_inputs(shape, draw) for draw in draws]


def _gradient(case: Case, outputs: list[torch.Tensor], above: list[torch.Tensor]) -> None:
    torch.autograd.backward(outputs[: case.outputs], above[: case.outputs])


def _compare(case: Case, tensors: Tensors, run: Callable[[], list[torch.Tensor]]) -> None:
    """Raise AssertionError where an output differs from that of plain PyTorch, if that fits into memory."""
    copies = {name: tensor.clone() if name in case.states else tensor for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            want = results(on("torch", case)(**copies))
    except torch.OutOfMemoryError:
        return
    error = max(relative_error(a.detach(), b) for a, b in zip(run()[: case.outputs], want, strict=False))
    if not error <= SAME:
        raise AssertionError(f"differs from plain PyTorch by {error:.1e}")


def _peer_times(context: Context, case: Case, shape: Shape, peer: Peer) -> Times:
    if context.plan.device.type != "cuda":
        return Times(problem="runs on GPUs only")
    found = times(context, case, shape, partial(peer.load(), **case.options), peer, compared=not peer.whole)
    return Times(found.whole) if peer.whole else found


def _compiled_times(context: Context, case: Case, shape: Shape, allowance: Allowance) -> Times:
    if allowance.spent:
        return Times(problem="skipped: the time to compile was spent")
    with allowance.used():
        return times(context, case, shape, compiled(case, context.plan.compiler))


def _guarded(measure: Callable[[], Times]) -> Times:
    try:
        return measure()
    except ImportError:
        return Times(problem="not installed")
    except torch.OutOfMemoryError:
        return Times(problem="out of memory")
    except Exception as error:
        return Times(problem=f"{type(error).__name__}: {error}"[:300])
