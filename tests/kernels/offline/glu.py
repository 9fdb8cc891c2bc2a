"""What the kernels of `glu` compile to: tiles of any width, with rows that lie apart."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_POINTERS = {
    "forward": ("gate_ptr", "value_ptr", "y_ptr"),
    "backward": ("gate_ptr", "value_ptr", "grad_ptr", "grad_gate_ptr", "grad_value_ptr"),
}

CASES = [
    Case(
        f"{name}, {'gelu' if gelu else 'identity'}",
        f"cistron_kernels.glu.kernel:{name}_kernel",
        dict.fromkeys(pointers, "bf16"),
        dict.fromkeys(("rows", "columns", "gate_stride", "value_stride"), "i32"),
        {"GELU": gelu, "ROWS": 2, "COLUMNS": 1024},
        divisible=("columns", "gate_stride", "value_stride"),
        most_registers=80,
    )
    for name, pointers in _POINTERS.items()
    for gelu in (False, True)
]
