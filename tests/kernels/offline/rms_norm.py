"""What the kernels of `rms_norm` compile to at the widths of Evo 2 1B and 7B, and at the widest that they take."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_SCALARS = {"rows": "i32", "columns": "i32", "eps": "fp32"}
_FORWARD = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "total_ptr"), "bf16")
_BACKWARD = {
    **dict.fromkeys(("x_ptr", "weight_ptr", "grad_y_ptr", "grad_total_ptr", "grad_x_ptr", "narrow_ptr"), "bf16"),
    "partial_ptr": "fp32",
}
_AUTOCAST = {"residual_ptr": "fp32", "weight_ptr": "fp32", "total_ptr": "fp32"}
_AUTOCAST_BACKWARD = dict.fromkeys(("x_ptr", "weight_ptr", "grad_total_ptr", "grad_x_ptr"), "fp32")

_TILE = (1, 2048, 4)
_BOTH = {"ADD": True, "NARROW": True, "STAGES": 3}


def _case(name, kernel, pointers, tile, *, registers, **constants):
    rows, columns, warps = tile
    return Case(
        name,
        f"cistron_kernels.rms_norm.kernel:{kernel}_kernel",
        pointers,
        _SCALARS,
        {"EPS_INSIDE": False, "ROWS": rows, "COLUMNS": columns, **constants},
        divisible=("columns",),
        num_warps=warps,
        most_registers=registers,
    )


CASES = [
    _case("forward, residual", "forward", _FORWARD, (2, 2048, 4), ADD=True, registers=64),
    _case("forward, autocast", "forward", _FORWARD | _AUTOCAST, (2, 2048, 4), ADD=True, registers=80),
    _case("backward", "backward", _BACKWARD, (1, 2048, 4), ADD=False, NARROW=False, STAGES=3, registers=128),
    _case("backward, 7B", "backward", _BACKWARD, (1, 4096, 8), ADD=True, NARROW=False, STAGES=3, registers=128),
    _case("backward, widest", "backward", _BACKWARD, (1, 8192, 16), ADD=True, NARROW=False, STAGES=2, registers=128),
    _case("backward, autocast", "backward", _BACKWARD | _AUTOCAST_BACKWARD, _TILE, registers=168, **_BOTH),
]
