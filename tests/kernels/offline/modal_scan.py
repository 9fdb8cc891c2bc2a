"""What the kernels of `modal_scan` compile to at Evo 2's widths, with the tiles that they are launched with."""

from __future__ import annotations

import triton.language as tl
from tests.kernels.offline.compiler import Case

from cistron_kernels.modal_scan.kernel import BLACKWELL, FP32, HOPPER, OTHERS, Tile

_SIZES = ("channels", "length", "real", "poles")
_PLACED = {"forward": ("x", "y"), "backward": ("x", "grad_y", "grad_x")}
_PARAMETERS = {"log_poles_ptr": "fp32", "residues_ptr": "fp32", "skip_ptr": "fp32", "lengths_ptr": "i64"}
_POINTERS = {
    "forward": {"state_ptr": "fp32", "carry_ptr": "fp32", "final_ptr": "fp32", "slope_ptr": "fp32"},
    "backward": dict.fromkeys(
        ("carry_ptr", "grad_final_ptr", "grad_taps_ptr", "grad_skip_ptr", "grad_log_poles_ptr", "grad_residues_ptr",
         "grad_state_ptr"), "fp32",
    ),
}  # fmt: skip
_TOKENS = {
    "forward": ("x_ptr", "history_ptr", "taps_ptr", "y_ptr"),
    "backward": ("x_ptr", "history_ptr", "taps_ptr", "grad_y_ptr", "grad_x_ptr", "grad_history_ptr"),
}


def _case(
    kernel: str, tile: Tile, architectures: tuple[int, ...], *, gated: bool, kind: str = "bf16", **more: bool
) -> Case:
    precise = kind == "fp32"
    strides = [f"{name}_{which}_stride" for name in _PLACED[kernel] for which in ("batch", "row")]
    scalars = dict.fromkeys((*_SIZES, *strides), "i32")
    flags = dict.fromkeys(("HISTORY", "STATE", "LENGTHS", "FINAL"), False) | more
    return Case(
        f"{kernel}{', gated' if gated else ''}{', fp32' if precise else ''}{', state' if more else ''}",
        f"cistron_kernels.modal_scan.{kernel}:{kernel}_kernel",
        {**_PARAMETERS, **_POINTERS[kernel], **dict.fromkeys(_TOKENS[kernel], kind)},
        scalars,
        {
            "GATED": gated,
            **flags,
            "OPERAND": tl.float32 if precise else tl.bfloat16,
            "PRECISION": "tf32x3" if precise else "tf32",
            "ROWS": tile.rows,
            "CHUNK": tile.chunk,
            "POLES": 16,
            "KEEP": 2048,
        },
        divisible=tuple(scalars.keys() - {"real"}),
        num_warps=tile.warps,
        num_stages=tile.stages,
        matrix="mma" if precise else "wgmma",
        architectures=architectures,
    )


_BOTH = ("forward", "backward")
_TILES = {90: HOPPER, 100: BLACKWELL, 80: OTHERS}
_GATED = {"gated": True, "HISTORY": True, "STATE": True, "LENGTHS": True, "FINAL": True}
CASES = [
    *(
        _case(kernel, tile, (architecture,), **flags)
        for flags in ({"gated": False}, {"gated": True}, _GATED)
        for architecture, tiles in _TILES.items()
        for kernel, tile in zip(_BOTH, tiles, strict=True)
    ),
    *(_case(kernel, tile, (80, 90, 100), gated=False, kind="fp32") for kernel, tile in zip(_BOTH, FP32, strict=True)),
]
