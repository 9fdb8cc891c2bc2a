"""What the kernels of `bias_gelu` compile to: tiles of any width, with the bias in bf16 or, under autocast, in fp32."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_POINTERS = {"forward": ("x_ptr", "y_ptr"), "backward": ("x_ptr", "grad_y_ptr", "grad_x_ptr")}

CASES = [
    Case(
        f"{name}, bias in {bias}",
        f"cistron_kernels.bias_gelu.kernel:{name}_kernel",
        {
            **dict.fromkeys(pointers, "bf16"),
            "bias_ptr": bias,
            **({"partial_ptr": "fp32"} if name == "backward" else {}),
        },
        dict.fromkeys(("rows", "columns", "x_stride"), "i32"),
        {"ROWS": 2, "COLUMNS": 1024, "STAGES": 3},
        divisible=("columns", "x_stride"),
        most_registers=64 if name == "forward" else 128,
    )
    for name, pointers in _POINTERS.items()
    for bias in ("bf16", "fp32")
]
