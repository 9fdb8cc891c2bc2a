"""What the kernels of `cross_entropy` compile to with the vocabularies of Evo 2, 512, and of ESM-2, 33."""

from __future__ import annotations

import triton.language as tl
from tests.kernels.offline.compiler import Case

_PLACE = {"targets_ptr": "i64", "scored_ptr": "fp32"}
_FORWARD = {"logits_ptr": "bf16", **_PLACE, "losses_ptr": "fp32"}
_BACKWARD = {"logits_ptr": "bf16", **_PLACE, "grad_losses_ptr": "fp32", "grad_logits_ptr": "bf16"}


def _loss_case(name, pointers, rows, columns, *, aligned):
    return Case(
        f"{name}, {columns} columns",
        f"cistron_kernels.cross_entropy.kernel:{name}_kernel",
        pointers,
        dict.fromkeys(("rows", "columns", "stride", "ignore_index", "grad_stride"), "i32"),
        {"ROWS": rows, "COLUMNS": columns},
        divisible=("columns", "stride") if aligned else (),
        wide_loads=aligned,
        most_registers=160,
    )


def _score_case(kind, classes, warps, *, tokens=64, depth=32, matrix="wgmma"):
    return Case(
        f"score_logprob, {kind}, {classes} classes",
        "cistron_kernels.cross_entropy.kernel:score_kernel",
        {"hidden_ptr": kind, "weight_ptr": kind, "targets_ptr": "i64", "scores_ptr": "fp32"},
        dict.fromkeys(("rows", "classes", "channels", "stride"), "i32"),
        {
            "OPERAND": {"bf16": tl.bfloat16, "fp32": tl.float32}[kind],
            "TOKENS": tokens,
            "CLASSES": classes,
            "DEPTH": depth,
        },
        divisible=("channels", "stride"),
        num_warps=warps,
        num_stages=1 if classes > 128 else 2,
        matrix=matrix,
    )


CASES = [
    _loss_case("forward", _FORWARD, 4, 512, aligned=True),
    _loss_case("backward", _BACKWARD, 4, 512, aligned=True),
    _loss_case("forward", _FORWARD, 32, 64, aligned=False),
    _loss_case("backward", _BACKWARD, 32, 64, aligned=False),
    _score_case("bf16", 512, 8),
    _score_case("bf16", 64, 4),
    _score_case("fp32", 512, 8, tokens=32, depth=16, matrix="mma"),
]
