"""The section of times: each op forward and backward, beside plain PyTorch, torch.compile and other libraries.

An op that failed its check is not timed, nor is a competitor whose results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.gpu.budget import Allowance, Share
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Case, Ceilings, Draw, Peer, Shape, Tensors, leaves, relative_error, results
from benchmarks.gpu.check import random_cotangents
from benchmarks.gpu.context import Context
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.report import Row
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


def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield one row per case, model and number of tokens."""
    plan = context.plan
    compiling = Allowance(plan.compiling_seconds)
    for case, shape in _sizes(plan):
        row = partial(Row, "kernels", f"{case.name}, {shape.model.name}", f"{shape.tokens:,}")
        if case.name in context.failed:
            yield row(problem="not timed: its check failed")
        elif share.spent:
            yield row(problem=share.reason())
        else:
            first = shape.model == plan.models[case.family][0] and shape.tokens == plan.compiled_tokens
            yield _timed(context, case, shape, row, compiling if first and case.compiled else None)
            context.free()


def _sizes(plan: Plan) -> Iterator[tuple[Case, Shape]]:
    """Yield what is timed: all cases at the most telling number of tokens first."""
    for tokens in plan.tokens:
        for case in all_cases().values():
            for model in plan.models[case.family]:
                if not case.steps:
                    yield case, Shape(model, 1, tokens)
                elif tokens == plan.tokens[0]:
                    yield from ((case, Shape(model, rows, 1)) for rows in plan.rows)


def one_pass(case: Case, function: Callable[..., Any], tensors: Tensors) -> list[torch.Tensor]:
    """Run a case forward and, where it has one, backward; return its outputs."""
    outputs = results(function(**leaves(tensors, case.gradients)))
    _gradient(case, outputs, random_cotangents(outputs))
    return outputs


def compiled_reference(case: Case, compiler: str) -> Callable[..., Any]:
    """Return what torch.compile makes of the definition in plain PyTorch."""
    return torch.compile(case.reference(), backend=compiler, dynamic=False)


def _timed(context: Context, case: Case, shape: Shape, row: Callable[..., Row], compiling: Allowance | None) -> Row:
    contenders: dict[str, Callable[[], Times]] = {
        "ours": lambda: _times(context, case, shape, partial(case.public(), **case.options), "triton"),
        "torch": lambda: _times(context, case, shape, partial(case.public(), **case.options), "torch"),
        **{peer.name: partial(_peer_times, context, case, shape, peer) for peer in case.peers},
    }
    if compiling and not compiling.spent:
        contenders["compiled"] = partial(_compiled_times, context, case, shape, compiling)
    times = {}
    for name, measure in contenders.items():
        times[name] = _guarded(measure)
        context.free()
    return _row(case, shape, context.ceilings, times, row)


def _times(
    context: Context,
    case: Case,
    shape: Shape,
    function: Callable[..., Any],
    backend: Backend | None,
    adapt: Callable[[Tensors], Tensors] = dict,
    *,
    compared: bool = True,
) -> Times:
    """Measure one form of a case; raise where its output is not that of plain PyTorch."""
    plan, clock = context.plan, context.clock
    tensors = case.timed_inputs(shape, Draw(plan.device, torch.bfloat16))
    sets = [adapt(tensors)]
    for seed in range(1, clock.num_sets(sum(tensor.nbytes for tensor in tensors.values()))):
        sets.append(adapt(case.timed_inputs(shape, Draw(plan.device, torch.bfloat16, seed=seed))))

    def outputs(i: int) -> list[torch.Tensor]:
        with override(backend) if backend else nullcontext():
            return results(function(**leaves(sets[i % len(sets)], case.gradients)))

    if compared and backend != "torch":
        _compare(case, tensors, partial(outputs, 0))
    forward = clock.seconds(lambda i: lambda: outputs(i))
    if not case.gradients:
        return Times(forward)
    above = random_cotangents(outputs(0)[: case.outputs])

    def backward(i: int) -> Callable[[], object]:
        found = outputs(i)
        return lambda: _gradient(case, found, above)

    return Times(forward, clock.seconds(backward))


def _gradient(case: Case, outputs: list[torch.Tensor], above: list[torch.Tensor]) -> None:
    if case.gradients:
        torch.autograd.backward(outputs[: case.outputs], above[: case.outputs])


def _compare(case: Case, tensors: Tensors, run: Callable[[], list[torch.Tensor]]) -> None:
    """Raise AssertionError where an output differs from that of plain PyTorch, if that fits into memory."""
    copies = {name: tensor.clone() if name in case.states else tensor for name, tensor in tensors.items()}
    try:
        with torch.no_grad(), override("torch"):
            want = results(case.public()(**copies, **case.options))
    except torch.OutOfMemoryError:
        return
    error = max(relative_error(a.detach(), b) for a, b in zip(run()[: case.outputs], want, strict=False))
    if not error <= SAME:
        raise AssertionError(f"differs from plain PyTorch by {error:.1e}")


def _peer_times(context: Context, case: Case, shape: Shape, peer: Peer) -> Times:
    if context.plan.device.type != "cuda":
        return Times(problem="runs on GPUs only")
    function = partial(peer.load(), **case.options)
    times = _times(context, case, shape, function, None, peer.adapt, compared=not peer.whole)
    return Times(times.whole, None) if peer.whole else times


def _compiled_times(context: Context, case: Case, shape: Shape, allowance: Allowance) -> Times:
    with allowance.used():
        function = partial(compiled_reference(case, context.plan.compiler), **case.options)
        return _times(context, case, shape, function, None)


def _guarded(measure: Callable[[], Times]) -> Times:
    try:
        return measure()
    except ImportError:
        return Times(problem="not installed")
    except torch.OutOfMemoryError:
        return Times(problem="out of memory")
    except Exception as error:
        return Times(problem=f"{type(error).__name__}: {error}"[:300])


def _row(case: Case, shape: Shape, ceilings: Ceilings, times: dict[str, Times], row: Callable[..., Row]) -> Row:
    figures: dict[str, Any] = {name: asdict(measured) for name, measured in times.items()}
    ours = times["ours"]
    if ours.problem:
        return row(problem=ours.problem, figures=figures)
    passes = {"forward": (case.forward, ours.forward, case.asked[0])}
    if case.backward is not None and ours.backward is not None:
        passes["backward"] = (case.backward, ours.backward, case.asked[1])
    shares = {name: cost(shape).least_seconds(ceilings) / seconds for name, (cost, seconds, _) in passes.items()}
    asked = {name: goal for name, (_, _, goal) in passes.items() if goal is not None}
    return row(
        shown=" + ".join(f"{1e6 * seconds:,.0f}" for _, seconds, _ in passes.values()) + " µs",
        share=" ".join(f"{share:.2f}" for share in shares.values()),
        beside=", ".join(_ratio(name, ours, other) for name, other in times.items() if name != "ours"),
        asked=" ".join(f"{goal:.2f}" for goal in asked.values()),
        met=all(shares[name] >= goal for name, goal in asked.items()) if asked else None,
        figures={**figures, "shares": shares},
    )


def _ratio(name: str, ours: Times, other: Times) -> str:
    """Return how many times longer the other takes, forward and backward or both together."""
    if other.problem:
        return f"{name}: {other.problem[:40]}"
    if other.backward is None or ours.backward is None:
        return f"{name} {other.whole / ours.whole:.1f}"
    return f"{name} {other.forward / ours.forward:.1f} {other.backward / ours.backward:.1f}"
