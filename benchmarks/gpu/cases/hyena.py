"""The Hyena operators: filters alone, and fused with the projection filter and both gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.gpu.cases.case import BF16_BYTES, Case, Cost, Draw, Layout, Peer, Shape, Tensors

PROJECTION_TAPS: Final = 3
HCS_TAPS: Final = 7
HCM_TAPS: Final = 128
POLES: Final = 16
CHUNK: Final = 64
"""Tokens of a chunk in the count of the scan's products."""

HCS: Final = "gated_fir, HCS"
HCM: Final = "gated_fir, HCM"
HCL: Final = "gated_modal_scan, HCL"
"""The three operators as the model runs them."""

_PARAMETERS: Final = ("projected", "projection_taps")


def cases() -> list[Case]:
    """Return the cases of this module."""
    gated: dict[str, Any] = {"family": "evo2", "forward": _fused(8, 21), "backward": _fused(14, 70)}
    return [
        Case("hyena_fir, projection", "hyena_fir", "hyena_fir", "evo2", inputs=_projection,
             options={"order": "correlation"}, gradients=("x", "taps"), forward=_alone(3, 2), backward=_alone(3, 3),
             layouts=_layouts("x"), peers=(Peer("causal-conv1d", _causal_conv1d),
                                           Peer("fla-core", _fla_conv1d, _token_major("x"))), works=()),
        Case("hyena_fir, HCM", "hyena_fir", "hyena_fir", "evo2", inputs=_filter("x", HCM_TAPS),
             options={"order": "impulse"}, gradients=("x", "taps", "skip"), layouts=_layouts("x"),
             forward=_alone(1, 2, 4 * HCM_TAPS), backward=_alone(1, 3, 12 * HCM_TAPS), works=()),
        Case("modal_scan", "modal_scan", "modal_scan", "evo2", inputs=_scan, layouts=_layouts("x"),
             gradients=("x", "log_poles", "residues"), forward=_alone(1, 2, _SCAN_FLOPS), asked=(0.70, None),
             backward=_alone(1, 3, 3 * _SCAN_FLOPS), works=()),
        Case(HCS, "hyena_fir", "gated_fir", inputs=_gated_fir(HCS_TAPS), options={"order": "correlation"},
             gradients=(*_PARAMETERS, "taps"), layouts=_layouts("projected", HCS_TAPS), asked=(0.85, 0.60), **gated),
        Case(HCM, "hyena_fir", "gated_fir", "evo2", inputs=_gated_fir(HCM_TAPS), options={"order": "impulse"},
             gradients=(*_PARAMETERS, "taps", "skip"), layouts=_layouts("projected", HCM_TAPS), asked=(0.70, 0.60),
             forward=_fused(8, 21 + 4 * HCM_TAPS), backward=_fused(14, 70 + 12 * HCM_TAPS)),
        Case(HCL, "modal_scan", "gated_modal_scan", "evo2", inputs=_gated_scan, asked=(0.70, 0.60),
             gradients=(*_PARAMETERS, "log_poles", "residues", "skip"), layouts=_layouts("projected", 0),
             forward=_fused(8, 21 + _SCAN_FLOPS), backward=_fused(14, 70 + 3 * _SCAN_FLOPS)),
    ]  # fmt: skip


_SCAN_FLOPS: Final = 2 * CHUNK + 4 * POLES


def _alone(rows: int, times: int, flops: float = 0.0) -> Callable[[Shape], Cost]:
    """Return the cost of a filter over `rows` x width channels that moves `times` numbers per token and channel."""

    def cost(shape: Shape) -> Cost:
        elements = shape.tokens * shape.model.width * rows
        return Cost(elements * times * BF16_BYTES, elements * flops)

    return cost


def _fused(byte_count: int, flops: float) -> Callable[[Shape], Cost]:
    """Return the cost per token and channel of a whole operator: 3 reads and 1 write, backward 4 reads and 3 writes."""
    return lambda shape: Cost(shape.tokens * shape.model.width * byte_count, shape.tokens * shape.model.width * flops)


def _projection(shape: Shape, draw: Draw) -> Tensors:
    rows = 3 * shape.model.width
    return {"x": draw.normal(shape.batch, rows, shape.length), "taps": draw.normal(rows, PROJECTION_TAPS, scale=0.5)}


def _filter(name: str, taps: int) -> Callable[[Shape, Draw], Tensors]:
    def inputs(shape: Shape, draw: Draw) -> Tensors:
        tensors = {
            name: draw.normal(shape.batch, shape.model.width, shape.length),
            "taps": draw.normal(shape.model.groups, taps, scale=taps**-0.5),
        }
        return {**tensors, "skip": draw.normal(shape.model.width)} if taps == HCM_TAPS else tensors

    return inputs


def _modal(shape: Shape, draw: Draw) -> Tensors:
    size = (shape.model.width, POLES)
    return {"log_poles": draw.log_poles(*size), "residues": draw.normal(*size, scale=0.1, dtype=torch.float32)}


def _scan(shape: Shape, draw: Draw) -> Tensors:
    return {"x": draw.normal(shape.batch, shape.model.width, shape.length), **_modal(shape, draw)}


def _projected(shape: Shape, draw: Draw) -> Tensors:
    rows = 3 * shape.model.width
    return {
        "projected": draw.normal(shape.batch, rows, shape.length),
        "projection_taps": draw.normal(rows, PROJECTION_TAPS, scale=0.5),
    }


def _gated_fir(taps: int) -> Callable[[Shape, Draw], Tensors]:
    def inputs(shape: Shape, draw: Draw) -> Tensors:
        others = _filter("x", taps)(Shape(shape.model, 1, 1), draw)
        return {**_projected(shape, draw), **{name: others[name] for name in ("taps", "skip") if name in others}}

    return inputs


def _gated_scan(shape: Shape, draw: Draw) -> Tensors:
    skip = draw.normal(shape.model.width, dtype=torch.float32)
    return {**_projected(shape, draw), **_modal(shape, draw), "skip": skip}


def _layouts(name: str, taps: int | None = None) -> dict[str, Layout]:
    """Return channels first, as timed; tokens first; and for whole operators padded rows that continue others."""
    layouts: dict[str, Layout] = {"channels first": dict, "tokens first": _strided(name)}
    return layouts if taps is None else {**layouts, "continued, padded": _continued(taps)}


def _strided(name: str) -> Layout:
    return lambda tensors: {**tensors, name: tensors[name].mT.contiguous().mT}


def _continued(taps: int) -> Layout:
    def add_history(tensors: Tensors) -> Tensors:
        projected = tensors["projected"]
        batch, rows, length = projected.shape
        draw = Draw(projected.device, projected.dtype, seed=1)
        if taps:
            past = {"history": draw.normal(batch, rows // 3, taps - 1)}
        else:
            past = {"state": draw.normal(batch, rows // 3, POLES, dtype=torch.promote_types(draw.dtype, torch.float32))}
        lengths = torch.tensor([length - 3 - 5 * row for row in range(batch)], device=projected.device).clamp_min(1)
        past["projection_history"] = draw.normal(batch, rows, PROJECTION_TAPS - 1)
        return {**tensors, **past, "lengths": lengths}

    return add_history


def _token_major(name: str) -> Layout:
    return lambda tensors: {**tensors, name: tensors[name].mT.contiguous()}


def _causal_conv1d() -> Callable[..., Any]:
    from causal_conv1d import causal_conv1d_fn

    return lambda x, taps, order: causal_conv1d_fn(x, taps)


def _fla_conv1d() -> Callable[..., Any]:
    from fla.modules.causal_conv1d import causal_conv1d

    return lambda x, taps, order: causal_conv1d(x, taps)[0].mT
