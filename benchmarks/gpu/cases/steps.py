"""Single tokens: what generation runs per layer and step, in place on rings of inputs and modal states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.gpu.cases.case import BF16_BYTES, Case, Cost, Draw, Layout, Shape, Tensors
from benchmarks.gpu.cases.hyena import HCM_TAPS, HCS_TAPS, POLES, PROJECTION_TAPS

_FP32_BYTES: Final = 4


def cases() -> list[Case]:
    """Return the cases of this module."""
    alone: dict[str, Any] = {"family": "evo2", "steps": True, "compiled": False, "works": ()}
    common = {**alone, "works": ("decoding",)}
    slots: dict[str, Layout] = {"one slot": dict, "a slot per row": _slot_per_row}
    correlation, impulse = {"order": "correlation"}, {"order": "impulse"}
    return [
        Case("fir_step, HCM", "decode_step", "fir_step", inputs=_ring_step(HCM_TAPS), options=impulse, layouts=slots,
             states=("history",), forward=_cost(("width", HCM_TAPS)), **alone),
        Case("modal_step", "decode_step", "modal_step", inputs=_modal_step, states=("state",),
             forward=_cost(modal=True), **alone),
        Case("gated_fir_step, HCS", "decode_step", "gated_fir_step", inputs=_gated_fir_step(HCS_TAPS), layouts=slots,
             options=correlation, states=("projection_history", "history"),
             forward=_cost(("width", HCS_TAPS), gated=True), **common),
        Case("gated_fir_step, HCM", "decode_step", "gated_fir_step", inputs=_gated_fir_step(HCM_TAPS), layouts=slots,
             options=impulse, states=("projection_history", "history"),
             forward=_cost(("width", HCM_TAPS), gated=True), **common),
        Case("gated_modal_step, HCL", "decode_step", "gated_modal_step", inputs=_gated_modal_step, layouts=slots,
             states=("projection_history", "state"), forward=_cost(modal=True, gated=True), **common),
    ]  # fmt: skip


def _cost(ring: tuple[str, int] | None = None, *, modal: bool = False, gated: bool = False) -> Callable[[Shape], Cost]:
    """Return the cost of a step: a ring is read whole but for the slot that is written, a state read and written."""

    def cost(shape: Shape) -> Cost:
        width = shape.model.width
        per_row, once = 2 * width * BF16_BYTES, 0
        if ring:
            per_row += width * ring[1] * BF16_BYTES
            once += shape.model.groups * ring[1] * BF16_BYTES
        if modal:
            per_row += 2 * width * POLES * _FP32_BYTES
            once += 2 * width * POLES * _FP32_BYTES
        if gated:
            per_row += (2 + 3 * PROJECTION_TAPS) * width * BF16_BYTES
            once += 3 * PROJECTION_TAPS * width * BF16_BYTES
        return Cost(shape.batch * per_row + once)

    return cost


def _ring(shape: Shape, draw: Draw, channels: int, taps: int) -> torch.Tensor:
    return draw.normal(shape.batch, taps + 1, channels)


def _filter(shape: Shape, draw: Draw, taps: int) -> Tensors:
    tensors = {
        "taps": draw.normal(shape.model.groups, taps, scale=taps**-0.5),
        "history": _ring(shape, draw, shape.model.width, taps),
        "end": torch.full((1,), taps + 3, device=draw.device),
    }
    return {**tensors, "skip": draw.normal(shape.model.width)} if taps == HCM_TAPS else tensors


def _ring_step(taps: int) -> Callable[[Shape, Draw], Tensors]:
    return lambda shape, draw: {"x": draw.normal(shape.batch, shape.model.width), **_filter(shape, draw, taps)}


def _modal(shape: Shape, draw: Draw) -> Tensors:
    size = (shape.model.width, POLES)
    return {
        "log_poles": draw.log_poles(*size),
        "residues": draw.normal(*size, scale=0.1, dtype=torch.float32),
        "state": draw.normal(shape.batch, *size, dtype=torch.float32),
    }


def _modal_step(shape: Shape, draw: Draw) -> Tensors:
    return {"x": draw.normal(shape.batch, shape.model.width), **_modal(shape, draw)}


def _projected(shape: Shape, draw: Draw) -> Tensors:
    rows = 3 * shape.model.width
    return {
        "projected": draw.normal(shape.batch, rows),
        "projection_taps": draw.normal(rows, PROJECTION_TAPS, scale=0.5),
        "projection_history": _ring(shape, draw, rows, PROJECTION_TAPS),
        "projection_end": torch.full((1,), PROJECTION_TAPS + 3, device=draw.device),
    }


def _gated_fir_step(taps: int) -> Callable[[Shape, Draw], Tensors]:
    return lambda shape, draw: {**_projected(shape, draw), **_filter(shape, draw, taps)}


def _gated_modal_step(shape: Shape, draw: Draw) -> Tensors:
    skip = draw.normal(shape.model.width, dtype=torch.float32)
    return {**_projected(shape, draw), **_modal(shape, draw), "skip": skip}


def _slot_per_row(tensors: Tensors) -> Tensors:
    """Rows that have read different numbers of tokens."""
    found = dict(tensors)
    for name in ("end", "projection_end"):
        if name in found:
            rows = len(found["history" if name == "end" else "projection_history"])
            found[name] = found[name] + torch.arange(rows, device=found[name].device)
    return found
