"""What the kernels of `varlen_attention` compile to where torch's own kernel does not apply: fp32, and odd heads."""

from __future__ import annotations

from typing import Any

from tests.kernels.offline.compiler import Case

_FLASH = "cistron_kernels.varlen_attention.flash"
_QKV = ("q_ptr", "k_ptr", "v_ptr")
_STRIDES = tuple(f"{name}_{axis}" for name in "qkv" for axis in ("token", "head"))
_GRAD = ("grad_token", "grad_head")
_FP32 = dict.fromkeys(("lse_ptr", "delta_ptr"), "fp32")
_KERNELS = {
    "forward": ((*_QKV, "out_ptr"), ()),
    "query_gradient": ((*_QKV, "grad_out_ptr", "grad_q_ptr"), _GRAD),
    "key_gradient": ((*_QKV, "grad_out_ptr", "grad_k_ptr", "grad_v_ptr"), _GRAD),
}
_DELTA = Case(
    "delta, fp32, heads of 128",
    f"{_FLASH}:delta_kernel",
    dict.fromkeys(("out_ptr", "grad_out_ptr", "delta_ptr"), "fp32"),
    dict.fromkeys(("tokens", *_GRAD, "out_token"), "i32"),
    {"HEAD": 128, "WIDTH": 128, "TOKENS": 32},
    divisible=(*_GRAD, "out_token"),
    most_registers=80,
)


def _case(kernel: str, kind: str, head: int, width: int, blocks: dict[str, int], **expected: Any) -> Case:
    import triton.language as tl

    pointers, strides = _KERNELS[kernel]
    scalars = {**dict.fromkeys(("tokens", *_STRIDES, *strides, "out_token"), "i32"), "scale": "fp32"}
    lse = ("lse_ptr",) if kernel == "forward" else ("lse_ptr", "delta_ptr")
    if kernel != "forward":
        scalars["grad_scale"] = "fp32"
    tiles = {name: value for name, value in blocks.items() if name.isupper()}
    operand = {"fp32": tl.float32, "bf16": tl.bfloat16}[kind]
    precision = "tf32x3" if kind == "fp32" else "ieee"
    return Case(
        f"{kernel}, {kind}, heads of {head}",
        f"{_FLASH}:{kernel}_kernel",
        {**dict.fromkeys(pointers, kind), **{name: _FP32[name] for name in lse}, "map_ptr": "i32"},
        scalars,
        {"CAUSAL": True, "HEAD": head, "WIDTH": width, "OPERAND": operand, "PRECISION": precision, **tiles},
        divisible=(*_STRIDES, *strides, "out_token") if head == width else (),
        num_warps=blocks["num_warps"],
        num_stages=blocks["num_stages"],
        wide_loads=head == width,
        **expected,
    )


def _cases() -> list[Case]:
    from cistron_kernels.varlen_attention.kernel import BACKWARD_HALF, BACKWARD_WIDE, FORWARD_HALF, FORWARD_WIDE

    return [
        _case("forward", "fp32", 64, 64, FORWARD_WIDE[64], matrix="mma"),
        _case("forward", "fp32", 128, 128, FORWARD_WIDE[128], matrix="mma"),
        _case("query_gradient", "fp32", 128, 128, BACKWARD_WIDE[128], matrix="mma"),
        _case("key_gradient", "fp32", 64, 64, BACKWARD_WIDE[64], matrix="mma"),
        _case("key_gradient", "fp32", 128, 128, BACKWARD_WIDE[128], matrix="mma"),
        _case("forward", "bf16", 60, 64, FORWARD_HALF[64], matrix="wgmma"),
        _case("forward", "bf16", 100, 128, FORWARD_HALF[128], matrix="wgmma"),
        _case("key_gradient", "bf16", 100, 128, BACKWARD_HALF[128], matrix="mma"),
        _DELTA,
    ]


CASES = _cases()
