"""Attention: rotary positions of queries and keys, and softmax attention inside packed documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Final

import torch

from benchmarks.gpu.cases.case import BF16_BYTES, Case, Cost, Draw, Layout, Peer, Shape, Tensors, flattened, offsets
from cistron_kernels.rope import rotation

DNA: Final = (8_192,)
PROTEINS: Final = (73, 180, 251, 320, 402, 505, 777, 1024)
"""Tokens of packed documents, repeated as needed: contexts of Evo 2, and proteins as long as UniRef's."""

_BASE: Final = 10_000.0


def cases() -> list[Case]:
    """Return the cases of this module."""
    layouts: dict[str, Layout] = {"slices of one projection": _slices, "rows": dict, "packed": _packed}
    attention: dict[str, Any] = {"inputs": _attended, "gradients": ("q", "k", "v"), "imported": True, "compiled": False}
    return [
        Case("rope_pair", "rope", "rope_pair", "evo2", inputs=_at_positions, gradients=("q", "k"), outputs=2,
             forward=_turned(8), backward=_turned(8), layouts=layouts, asked=(0.85, None),
             peers=(Peer("liger-kernel", _liger_rope, _for_liger, in_place=True),)),
        Case("rotate_pair", "rope", "rotate_pair", "esm2", inputs=_at_angles, gradients=("q", "k"), outputs=2,
             forward=_turned(0, angles=True), backward=_turned(0, angles=True), asked=(0.85, None),
             layouts={"packed": _packed_with_angles, "rows": dict}),
        Case("varlen_attention, causal", "varlen_attention", "varlen_attention", "evo2",
             options={"causal": True, "scale": 128**-0.5}, forward=_attention(DNA, 2), backward=_attention(DNA, 5),
             **attention),
        Case("varlen_attention, proteins", "varlen_attention", "varlen_attention", "esm2",
             options={"causal": False, "scale": 64**-0.5}, forward=_attention(PROTEINS, 4),
             backward=_attention(PROTEINS, 10), **{**attention, "inputs": _attended_proteins}),
    ]  # fmt: skip


def documents(tokens: int, lengths: Sequence[int]) -> list[int]:
    """Return lengths, in turn, that sum to `tokens`; the last document is cut."""
    found: list[int] = []
    for length in cycle(lengths):
        left = tokens - sum(found)
        if not left:
            return found
        found.append(min(length, left))
    raise AssertionError("a cycle does not end")


def _turned(extra: int, *, angles: bool = False) -> Callable[[Shape], Cost]:
    """Return the cost of reading and writing queries and keys, and the positions or the angles."""

    def cost(shape: Shape) -> Cost:
        head_size = shape.model.width // shape.model.heads
        return Cost(shape.tokens * (4 * shape.model.width * BF16_BYTES + extra + (4 * head_size if angles else 0)))

    return cost


def _attention(lengths: Sequence[int], products: int) -> Callable[[Shape], Cost]:
    """Return the cost of attention whose FLOPs are `products` x width x the square of each document's length."""

    def cost(shape: Shape) -> Cost:
        squares = sum(length**2 for length in documents(shape.tokens, lengths))
        times = 4 if products <= 4 else 8
        return Cost(
            times * BF16_BYTES * shape.tokens * shape.model.width, float(products * squares * shape.model.width)
        )

    return cost


def _heads(shape: Shape, draw: Draw, names: str) -> Tensors:
    model = shape.model
    return {name: draw.normal(shape.batch, shape.length, model.heads, model.width // model.heads) for name in names}


def _frequencies(shape: Shape, draw: Draw) -> torch.Tensor:
    half = shape.model.width // shape.model.heads // 2
    return _BASE ** (-torch.arange(half, device=draw.device, dtype=torch.float32) / half)


def _at_positions(shape: Shape, draw: Draw) -> Tensors:
    positions = torch.arange(shape.length, device=draw.device)
    return {**_heads(shape, draw, "qk"), "positions": positions, "inv_freq": _frequencies(shape, draw)}


def _at_angles(shape: Shape, draw: Draw) -> Tensors:
    cos, sin = rotation(torch.arange(shape.length, device=draw.device), _frequencies(shape, draw))
    return {**_heads(shape, draw, "qk"), "cos": cos, "sin": sin}


def _slices(tensors: Tensors) -> Tensors:
    """Queries and keys as they come out of one linear layer, beside the values."""
    q, k, _ = torch.stack([tensors["q"], tensors["k"], tensors["k"]], dim=-3).unbind(dim=-3)
    return {**tensors, "q": q, "k": k}


def _packed(tensors: Tensors) -> Tensors:
    positions = tensors["positions"].repeat(len(tensors["q"]))
    return {**flattened("q", "k")(tensors), "positions": positions}


def _packed_with_angles(tensors: Tensors) -> Tensors:
    angles = {name: tensors[name].repeat(len(tensors["q"]), 1, 1) for name in ("cos", "sin")}
    return {**flattened("q", "k")(tensors), **angles}


def _attended(shape: Shape, draw: Draw) -> Tensors:
    """Contexts as in training; fewer tokens than one are three documents."""
    lengths = DNA if shape.tokens >= DNA[0] else (shape.tokens // 3 + 1,)
    cu_seqlens = offsets(documents(shape.tokens, lengths))
    return {**flattened("q", "k", "v")(_heads(shape, draw, "qkv")), "cu_seqlens": cu_seqlens}


def _attended_proteins(shape: Shape, draw: Draw) -> Tensors:
    return {**_attended(shape, draw), "cu_seqlens": offsets(documents(shape.tokens, PROTEINS))}


def _for_liger(tensors: Tensors) -> Tensors:
    """Heads before tokens (a view), and angles twice."""
    angles = torch.outer(tensors["positions"].float(), tensors["inv_freq"]).repeat(1, 2)[None]
    heads = {name: tensors[name].contiguous().transpose(1, 2) for name in "qk"}
    return {**heads, "cos": angles.cos(), "sin": angles.sin()}


def _liger_rope() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_rope

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        return [turned.transpose(1, 2) for turned in liger_rope(q, k, cos, sin)]

    return rope
