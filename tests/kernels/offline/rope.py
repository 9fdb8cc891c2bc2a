"""What the kernel of `rope` compiles to for Evo 2 and ESM-2, on slices of a fused projection."""

from __future__ import annotations

from tests.kernels.offline.compiler import Case

_POINTERS = {
    **dict.fromkeys(("q_ptr", "k_ptr", "rotated_q_ptr", "rotated_k_ptr"), "bf16"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "inv_freq_ptr"), "fp32"),
    "positions_ptr": "i64",
}
_STRIDES = ("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head")
_SCALARS = {
    **dict.fromkeys(("tokens", "length", "heads", *_STRIDES, "angle_batch", "angle_token"), "i32"),
    "scaling": "fp32",
}


def _case(name: str, half: int, heads: int, *, tables: bool, inverse: bool = False) -> Case:
    tile = {"HALF": half, "COLUMNS": half, "HEADS": heads, "TOKENS": 1024 // (half * heads)}
    return Case(
        name,
        "cistron_kernels.rope.kernel:rotate_kernel",
        _POINTERS,
        _SCALARS,
        {"PAIR": True, "TABLES": tables, "INVERSE": inverse, **tile},
        divisible=(*_STRIDES, "angle_batch", *(("angle_token",) if tables else ())),
        num_warps=4 if tables else 2,
        most_registers=80,
    )


CASES = [
    _case("positions, heads of 128", 64, 16, tables=False),
    _case("positions, heads of 128, backward", 64, 16, tables=False, inverse=True),
    _case("tables, heads of 64", 32, 4, tables=True),
    _case("tables, heads of 128", 64, 16, tables=True),
]
