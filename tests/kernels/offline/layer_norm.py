"""What the kernels of `layer_norm` compile to at the widths of ESM-2 650M and 15B."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_SCALARS = {"rows": "i32", "columns": "i32", "eps": "fp32"}
_FORWARD = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "total_ptr"), "bf16")
_BACKWARD = {
    **dict.fromkeys(("x_ptr", "weight_ptr", "grad_y_ptr", "grad_total_ptr", "grad_x_ptr", "narrow_ptr"), "bf16"),
    "partial_ptr": "fp32",
}
_AUTOCAST = dict.fromkeys(("residual_ptr", "weight_ptr", "bias_ptr", "total_ptr"), "fp32")
_AUTOCAST_BACKWARD = dict.fromkeys(("x_ptr", "weight_ptr", "grad_total_ptr", "grad_x_ptr"), "fp32")

_TILE = (1, 2048, 4)
_BOTH = {"ADD": True, "NARROW": True, "STAGES": 3}


def _case(name, kernel, pointers, tile, *, registers, **constants):
    rows, columns, warps = tile
    return Case(
        name,
        f"cistron_kernels.layer_norm.kernel:{kernel}_kernel",
        pointers,
        _SCALARS,
        {"ROWS": rows, "COLUMNS": columns, **constants},
        divisible=("columns",),
        num_warps=warps,
        most_registers=registers,
    )


CASES = [
    _case("forward, residual", "forward", _FORWARD, (2, 2048, 4), ADD=True, registers=80),
    _case("forward, autocast", "forward", _FORWARD | _AUTOCAST, (2, 2048, 4), ADD=True, registers=96),
    _case("backward", "backward", _BACKWARD, (1, 2048, 4), ADD=False, NARROW=False, STAGES=3, registers=128),
    _case("backward, 15B", "backward", _BACKWARD, (1, 8192, 16), ADD=True, NARROW=False, STAGES=2, registers=128),
    _case("backward, autocast", "backward", _BACKWARD | _AUTOCAST_BACKWARD, _TILE, registers=184, **_BOTH),
]
