"""The section of checks: every op in every precision and layout, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

import torch

from benchmarks.gpu.budget import Share
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Case, Draw, Shape
from benchmarks.gpu.check import Finding, check, run_ours
from benchmarks.gpu.contenders import compiled, one_pass
from benchmarks.gpu.context import Context
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.processes import isolated
from benchmarks.gpu.report import Row

SLOW_TO_COMPILE: Final = ("modal_scan", "hyena_fir", "varlen_attention")


def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield one row per case, and note in the context which may be timed."""
    plan = context.plan
    slowest_first = sorted(all_cases(), key=lambda name: all_cases()[name].op not in SLOW_TO_COMPILE)
    outcomes = isolated(
        check, slowest_first, plan, workers=plan.workers, seconds=share.left, then=compile_what_is_timed
    )
    for name, findings, problem in outcomes:
        problem = problem or _problem(all_cases()[name], findings)
        if not problem:
            context.passed.add(name)
        yield _row(name, findings or [], problem)


def compile_what_is_timed(name: str, plan: Plan) -> None:
    """Run a case at the models' sizes; whatever goes wrong here will be seen, and told, when it is timed."""
    case = all_cases()[name]
    for i, model in enumerate((*plan.models[case.family], *plan.further[case.family])):
        shape = Shape(model, plan.rows[0], 1) if case.steps else Shape(model, 1, min(plan.tokens))
        run_ours(case, case.timed_inputs(shape, Draw(plan.device, torch.bfloat16)))
        if i == 0 and case.compiled:
            tensors = case.timed_inputs(Shape(model, 1, plan.compiled_tokens), Draw(plan.device, torch.bfloat16))
            one_pass(case, compiled(case, plan.compiler), tensors)


def _problem(case: Case, findings: list[Finding]) -> str:
    """Return what keeps a case from being timed: something wrong, or something that nobody looked at."""
    if not findings or (case.gradients and any(f.backward is None and not f.problem for f in findings)):
        return "not checked"
    return next((f"{f.precision}, {f.layout}: {f.problem}" for f in findings if f.problem), "")


def _row(name: str, findings: list[Finding], problem: str) -> Row:
    shown = ", ".join(f"{p} {_worst(findings, p):.1e}" for p in dict.fromkeys(f.precision for f in findings))
    if problem.startswith("NotImplementedError: "):
        problem = problem.replace("NotImplementedError: ", "missing: ")
    return Row(
        "checks",
        name,
        " / ".join(dict.fromkeys(finding.layout for finding in findings)),
        shown=shown,
        asked="tolerances",
        met=not problem,
        problem=problem,
        figures={"findings": [asdict(finding) for finding in findings]},
    )


def _worst(findings: list[Finding], precision: str) -> float:
    return max(max(f.forward, f.backward or 0.0) for f in findings if f.precision == precision)
