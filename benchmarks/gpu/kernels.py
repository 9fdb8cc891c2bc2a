"""The section of times: each op forward and backward, beside plain PyTorch, torch.compile and other libraries.

An op that did not pass its check is not timed, nor is a competitor whose results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.gpu.budget import Allowance, Share
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Case, Ceilings, Shape
from benchmarks.gpu.contenders import Times, contenders
from benchmarks.gpu.context import Context
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.report import Row


def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield one row per case, model and number of tokens."""
    plan = context.plan
    compiling = Allowance(plan.compiling_seconds)
    for case, shape in _sizes(plan):
        row = partial(Row, "kernels", f"{case.name}, {shape.model.name}", f"{shape.tokens:,}")
        if problem := context.withheld(case.name):
            yield row(problem=problem)
        elif share.spent:
            yield row(problem=share.reason())
        else:
            first = shape.model == plan.models[case.family][0] and shape.tokens == plan.compiled_tokens
            yield _timed(context, case, shape, row, compiling if first and case.compiled else None)
            context.free()


def _sizes(plan: Plan) -> Iterator[tuple[Case, Shape]]:
    """Yield what is timed: all cases at the most telling number of tokens first, sizes that nobody asks for last."""
    for tokens in plan.tokens:
        for case in all_cases().values():
            for model in plan.models[case.family]:
                if not case.steps:
                    yield case, Shape(model, 1, tokens)
                elif tokens == plan.tokens[0]:
                    yield from ((case, Shape(model, rows, 1)) for rows in plan.rows)
    for case in all_cases().values():
        yield from ((case, Shape(model, 1, plan.tokens[0])) for model in plan.further[case.family])


def _timed(context: Context, case: Case, shape: Shape, row: Callable[..., Row], compiling: Allowance | None) -> Row:
    times = {}
    for name, measure in contenders(context, case, shape, compiling).items():
        times[name] = measure()
        context.free()
    found = partial(row, contenders={name: measured.problem for name, measured in times.items()})
    return _row(case, shape, context.ceilings, times, found)


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
