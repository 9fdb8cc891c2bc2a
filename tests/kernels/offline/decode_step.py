"""What the kernels of `decode_step` compile to for a layer of Evo 2, slots in device memory as in a CUDA graph."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_STEPS = "cistron_kernels.decode_step.steps"
_ENDS = dict.fromkeys(("first_end_ptr", "end_ptr"), "i64")
_HALF = dict.fromkeys(("x_ptr", "first_taps_ptr", "skip_ptr", "first_ring_ptr", "y_ptr"), "bf16")
_ROW = ("batch", "channels", "rows", "x_row")
_FIRST = ("first_slots", "first_row", "first_slot_stride", "first_end_stride", "first_end")
_RING = ("slots", "ring_row", "slot_stride", "end_stride", "end", "taps_group", "skip_group")
_DIVISIBLE = ("channels", "x_row", "first_row", "first_slot_stride")


def _fir(name: str, width: int, block: int, *, gated: bool = True) -> Case:
    return Case(
        name,
        f"{_STEPS}:fir_kernel",
        {**_HALF, **_ENDS, "taps_ptr": "bf16", "ring_ptr": "bf16"},
        dict.fromkeys((*_ROW, *_FIRST, *_RING), "i32"),
        {"GATED": gated, "IMPULSE": width > 7, "HAS_SKIP": width > 7, "FIRST_END": True, "END": True}
        | {"FIRST_TAPS": 3, "TAPS": width, "LAGS": (width + 7) // 8 * 8, "BLOCK": block},
        divisible=(*_DIVISIBLE, "ring_row", "slot_stride"),
        most_registers=152,
    )


def _modal(name: str, *, gated: bool = True) -> Case:
    fp32 = dict.fromkeys(("log_poles_ptr", "residues_ptr", "state_ptr", "skip_ptr"), "fp32")
    return Case(
        name,
        f"{_STEPS}:modal_kernel",
        {**_HALF, **fp32, "first_end_ptr": "i64"},
        dict.fromkeys((*_ROW, *_FIRST, "poles", "state_row"), "i32"),
        {"GATED": gated, "FIRST_END": True, "FIRST_TAPS": 3, "POLES": 16, "BLOCK": 64},
        divisible=(*_DIVISIBLE, "poles", "state_row"),
        most_registers=120,
    )


CASES = [
    _fir("HCS, 7 taps", 7, 128),
    _fir("HCM, 128 taps", 128, 64),
    _fir("HCM, 128 taps, filter alone", 128, 64, gated=False),
    _modal("HCL, 16 poles"),
    _modal("HCL, 16 poles, filter alone", gated=False),
]
