"""What the kernels of `hyena_fir` compile to in Evo 2: 16 channels share a filter of 7 (HCS) or 128 (HCM) taps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from tests.kernels.offline.compiler import Case

_FILTERS = ("x_ptr", "projection_history_ptr", "projection_taps_ptr", "history_ptr", "taps_ptr", "skip_ptr")
_PARTIALS = ("projection_taps_partial_ptr", "taps_partial_ptr", "skip_partial_ptr")
_SIZES = dict.fromkeys(("length", "groups", "channels_per_group", "width", "steps", "stretches"), "i32")
_HCM: dict[str, Any] = {"GATED": True, "SKIP": True, "IMPULSE": True, "BLOCKS": 3, "CHANNELS": 16}
_HCS: dict[str, Any] = {"GATED": True, "SKIP": False, "IMPULSE": False, "BLOCKS": 2, "CHANNELS": 16}
_DEPTHWISE: dict[str, Any] = {"GATED": False, "SKIP": False, "IMPULSE": False, "BLOCKS": 2, "CHANNELS": 1}
_SHARED = {"HISTORY": False, "TOKENS": 64, "GROUP": 8, "OPERAND": tl.bfloat16, "PRECISION": "tf32x3"}
_HISTORY = {"HISTORY": True}


def _case(name: str, direction: str, rows: int, constants: dict[str, Any], most_registers: int) -> Case:
    outputs = ("y",) if direction == "forward" else ("grad_y", "grad_x")
    strides = [f"{tensor}_{step}" for tensor in ("x", *outputs) for step in ("batch", "row")]
    pointers = dict.fromkeys((*_FILTERS, *(f"{output}_ptr" for output in outputs)), "bf16")
    if direction == "backward":
        pointers |= dict.fromkeys(_PARTIALS, "fp32")
    return Case(
        f"{name}, {direction}",
        f"cistron_kernels.hyena_fir.{direction}:{direction}_kernel",
        pointers,
        _SIZES | dict.fromkeys(strides, "i32"),
        {**_SHARED, **constants, "STRETCHES": rows // constants["CHANNELS"]},
        divisible=("length", *strides),
        num_warps=4,
        num_stages=1,
        matrix="wgmma",
        most_registers=most_registers,
        most_shared=64 * 1024,
    )


def _fp32(case: Case) -> Case:
    """Return a case in fp32, whose operands only Hopper and Blackwell have room for."""
    constants = {**case.constants, "GROUP": 4, "OPERAND": tl.float32}
    return replace(
        case,
        name=f"{case.name}, fp32",
        pointers=dict.fromkeys(case.pointers, "fp32"),
        constants=constants,
        num_warps=8,
        most_registers=248,
        most_shared=128 * 1024,
        architectures=(90, 100),
    )


CASES = [
    _case("HCM", "forward", 32, _HCM, 200),
    _case("HCS", "forward", 32, _HCS, 168),
    _case("depthwise", "forward", 32, _DEPTHWISE, 128),
    _case("HCM", "backward", 16, _HCM, 255),
    _case("HCS", "backward", 16, _HCS, 255),
    _case("depthwise", "backward", 16, _DEPTHWISE, 200),
    _case("HCM with history", "forward", 32, _HCM | _HISTORY, 200),
    _case("HCS with history", "forward", 32, _HCS | _HISTORY, 168),
    _case("HCM with history", "backward", 16, _HCM | _HISTORY, 255),
    _case("HCS with history", "backward", 16, _HCS | _HISTORY, 255),
    _fp32(_case("HCM with history", "forward", 32, _HCM | _HISTORY, 200)),
    _fp32(_case("depthwise", "backward", 16, _DEPTHWISE, 200)),
]
