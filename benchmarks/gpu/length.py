"""The section of lengths: what a token costs the Hyena operators and blocks, from short to very long contexts.

One row alone gets the parallel work of its own length only; rows that always hold the same number of tokens together
show the length itself. Before that, the end of the longest context is compared with the same tokens read as a
continuation of what precedes them, which also reaches tensors beyond 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.budget import Share
from benchmarks.gpu.cases import all_cases, run_by
from benchmarks.gpu.cases.case import Case, Draw, Shape, Tensors, relative_error
from benchmarks.gpu.cases.hyena import HCL, HCM, HCS
from benchmarks.gpu.context import Context
from benchmarks.gpu.random_models import random_evo2
from benchmarks.gpu.report import Row
from cistron_kernels.dispatch import override

ASKED = 1.05
TOLERANCE = 5e-3
_TAIL = 4_091


def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield a row per length for one row of tokens, for equally many tokens, and for whole blocks."""
    cases = [all_cases()[name] for name in (HCS, HCM, HCL)]
    for case in cases:
        if problem := context.withheld(case.name) or _end_differs(context, case):
            yield Row("length", case.name, problem=problem)
            return
    longest = context.plan.lengths[-1]
    yield from _rows(context, share, "operators, one row", lambda n: _operators(context, cases, 1, n))
    yield from _rows(context, share, "operators, equal tokens", lambda n: _operators(context, cases, longest // n, n))
    blocks = "blocks with their GEMMs, one row"
    if problem := context.withheld(*run_by("evo2", "decoding")):
        yield Row("length", blocks, problem=problem)
        return
    yield from _rows(context, share, blocks, _blocks(context))


def _rows(context: Context, share: Share, what: str, seconds: Callable[[int], float]) -> Iterator[Row]:
    """Yield the cost per token at each length, compared with the shortest."""
    base = 0.0
    for length in context.plan.lengths:
        if share.spent:
            yield Row("length", what, f"{length:,}", problem=share.reason())
            continue
        try:
            found = seconds(length)
        except torch.OutOfMemoryError:
            yield Row("length", what, f"{length:,}", problem="out of memory")
            continue
        finally:
            context.free()
        base = base or found
        growth = found / base
        yield Row(
            "length",
            what,
            f"{length:,}",
            shown=f"{1e9 * found:.2f} ns/token",
            beside=f"{growth:.3f} x the shortest",
            asked=f"{ASKED}",
            met=growth <= ASKED,
            figures={"seconds_per_token": found, "growth": growth},
        )


def _operators(context: Context, cases: list[Case], batch: int, length: int) -> float:
    """Return the seconds per token of all three operators' forward passes."""
    plan = context.plan
    total = 0.0
    for case in cases:
        tensors = case.timed_inputs(Shape(plan.models["evo2"][0], batch, length), Draw(plan.device, torch.bfloat16))
        total += context.clock.seconds(partial(_calling, case, tensors))
        del tensors
    return total / (batch * length)


def _calling(case: Case, tensors: Tensors, _round: int) -> Callable[[], object]:
    return partial(_called, case, tensors)


def _called(case: Case, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), override("triton"):
        return case.public()(**tensors, **case.options)


def _blocks(context: Context) -> Callable[[int], float]:
    """Return what measures a block of each operator, embedding and head included."""
    plan = context.plan
    changes = {**plan.changes.get(plan.decode_model, {}), "layer_pattern": "SDH"}
    model = random_evo2(plan.decode_model, device=plan.device, dtype=torch.bfloat16, **changes).eval()

    def seconds(length: int) -> float:
        ids = torch.randint(65, 85, (1, length), device=plan.device)

        @torch.inference_mode()
        def forward() -> None:
            with override("triton"):
                model(ids)

        return context.clock.seconds(lambda _: forward) / length

    return seconds


def _end_differs(context: Context, case: Case) -> str:
    """Return why nothing is timed: the end of the longest row differs from its continuation. Empty where not."""
    plan = context.plan
    length = plan.lengths[-1]
    tail = min(_TAIL, length // 2)
    tensors = case.timed_inputs(Shape(plan.models["evo2"][0], 1, length), Draw(plan.device, torch.bfloat16))
    projected = tensors["projected"]
    whole = _called(case, tensors)[0][..., -tail:].clone()
    _, projection_history, past = _called(case, {**tensors, "projected": projected[..., :-tail]})
    state = "state" if case.op == "modal_scan" else "history"
    past_tensors = {"projection_history": projection_history, state: past}
    end = _called(case, {**tensors, "projected": projected[..., -tail:], **past_tensors})[0]
    error = relative_error(end, whole)
    return "" if error <= TOLERANCE else f"not timed: a continuation differs from the whole by {error:.1e}"
