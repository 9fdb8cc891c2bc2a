"""Ops that treat each token by itself: norms, gates, rotary positions, and the heads' losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases.case import BF16_BYTES, Case, Cost, Draw, Layout, Peer, Shape, Tensors, flattened

ROWS_AND_PACKED = ("x", "residual", "gate", "value")


def cases() -> list[Case]:
    """Return the cases of this module."""
    layouts: dict[str, Layout] = {"packed": flattened(*ROWS_AND_PACKED), "rows": dict}
    halves: dict[str, Layout] = {"packed": flattened("gate", "value"), "halves of one tensor": _halves}
    evo2: dict[str, Any] = {"family": "evo2", "layouts": layouts}
    esm2: dict[str, Any] = {"family": "esm2", "layouts": layouts}
    rms = {"eps": 1e-6, "eps_inside": False}
    streams = {**layouts, "fp32 residual": _wide_residual}
    return [
        Case("rms_norm", "rms_norm", "rms_norm", inputs=_normed("weight"), options=rms, gradients=("x", "weight"),
             forward=_moved("width", 2), backward=_moved("width", 3), asked=(0.85, None),
             peers=(Peer("liger-kernel", _liger_rms_norm),), **evo2),
        Case("add_rms_norm", "rms_norm", "add_rms_norm", inputs=_normed("residual", "weight"), options=rms, outputs=2,
             gradients=("x", "residual", "weight"), forward=_moved("width", 4), backward=_moved("width", 4),
             asked=(0.85, None), peers=(Peer("liger-kernel", _liger_add_rms_norm),), **{**evo2, "layouts": streams}),
        Case("layer_norm", "layer_norm", "layer_norm", inputs=_normed("weight", "bias"), options={"eps": 1e-5},
             gradients=("x", "weight", "bias"), forward=_moved("width", 2), backward=_moved("width", 3),
             peers=(Peer("liger-kernel", _liger_layer_norm),), **esm2),
        Case("add_layer_norm", "layer_norm", "add_layer_norm", inputs=_normed("residual", "weight", "bias"),
             options={"eps": 1e-5}, outputs=2, gradients=("x", "residual", "weight", "bias"),
             forward=_moved("width", 4), backward=_moved("width", 4), **{**esm2, "layouts": streams}),
        Case("glu, identity", "glu", "glu", inputs=_gated, options={"activation": "identity"},
             gradients=("gate", "value"), forward=_moved("inner", 3), backward=_moved("inner", 5), asked=(0.85, None),
             **{**evo2, "layouts": halves}),
        Case("glu, gelu", "glu", "glu", inputs=_gated, options={"activation": "gelu"}, gradients=("gate", "value"),
             forward=_moved("inner", 3), backward=_moved("inner", 5), asked=(0.85, None),
             peers=(Peer("liger-kernel", _liger_geglu),), **{**evo2, "layouts": halves}),
        Case("bias_gelu", "bias_gelu", "bias_gelu", inputs=_biased, gradients=("x", "bias"),
             forward=_moved("inner", 2), backward=_moved("inner", 3), **esm2),
        *(Case(f"cross_entropy, {family}", "cross_entropy", "cross_entropy", family, inputs=_labelled,
               gradients=("logits",), forward=_moved("vocabulary", 1, extra=12), backward=_moved("vocabulary", 2),
               peers=(Peer("liger-kernel", _liger_cross_entropy, _without_weights, whole=True, in_place=True),),
               works=("training",))
          for family in ("evo2", "esm2")),
        Case("score_logprob", "cross_entropy", "score_logprob", "evo2", inputs=_scored, forward=_scoring_cost,
             works=()),
    ]  # fmt: skip


def _moved(size: str, times: int, *, extra: float = 0.0) -> Callable[[Shape], Cost]:
    """Return the cost of moving `times` bf16 numbers per token and channel, and `extra` bytes per token."""
    return lambda shape: Cost(shape.tokens * (getattr(shape.model, size) * times * BF16_BYTES + extra))


def _normed(*others: str) -> Callable[[Shape, Draw], Tensors]:
    def inputs(shape: Shape, draw: Draw) -> Tensors:
        width = shape.model.width
        tensors = {"x": draw.normal(shape.batch, shape.length, width)}
        for name in others:
            tensors[name] = draw.normal(*(tensors["x"].shape if name == "residual" else (width,)))
        return tensors

    return inputs


def _wide_residual(tensors: Tensors) -> Tensors:
    """The residual stream as autocast leaves it."""
    return {**tensors, "residual": tensors["residual"].float()}


def _gated(shape: Shape, draw: Draw) -> Tensors:
    return {name: draw.normal(shape.batch, shape.length, shape.model.inner) for name in ("gate", "value")}


def _halves(tensors: Tensors) -> Tensors:
    gate, value = torch.cat([tensors["gate"], tensors["value"]], dim=-1).chunk(2, dim=-1)
    return {"gate": gate, "value": value}


def _biased(shape: Shape, draw: Draw) -> Tensors:
    inner = shape.model.inner
    return {"x": draw.normal(shape.batch, shape.length, inner), "bias": draw.normal(inner)}


def _labelled(shape: Shape, draw: Draw) -> Tensors:
    """Every seventh token has no target, and the weights are those of lower-case repeats."""
    targets = draw.ids(shape.tokens, below=shape.model.vocabulary)
    targets[::7] = -100
    weights = torch.where(draw.ids(shape.tokens, below=3) == 0, 0.1, 1.0)
    return {"logits": draw.normal(shape.tokens, shape.model.vocabulary), "targets": targets, "weights": weights}


def _without_weights(tensors: Tensors) -> Tensors:
    """Another library has no weights per token."""
    return {"logits": tensors["logits"], "targets": tensors["targets"]}


def _scored(shape: Shape, draw: Draw) -> Tensors:
    width, vocabulary = shape.model.width, shape.model.vocabulary
    return {
        "hidden": draw.normal(shape.tokens, width),
        "weight": draw.normal(vocabulary, width, scale=width**-0.5),
        "targets": draw.ids(shape.tokens, below=vocabulary),
    }


def _scoring_cost(shape: Shape) -> Cost:
    width = shape.model.width
    return Cost(shape.tokens * (width * BF16_BYTES + 12), shape.tokens * 2.0 * width * shape.model.vocabulary)


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight, eps, eps_inside: liger_rms_norm(x, weight, eps, 0.0, "llama", False)


def _liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda x, residual, weight, eps, eps_inside: liger_fused_add_rms_norm(
        x, residual, weight, eps, 0.0, "llama", False
    )


def _liger_layer_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias, eps: liger_layer_norm(x, weight, bias, eps)


def _liger_geglu() -> Callable[..., Any]:
    """Its GELU is the approximation by tanh, which is cheaper than ours by erf."""
    from liger_kernel.transformers.functional import liger_geglu

    return lambda gate, value, activation: liger_geglu(gate, value)


def _liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, targets: liger_cross_entropy(logits, targets, reduction="sum")
