"""Causal finite filters of the Hyena operators, alone or between the projection's filter and the gates."""

from __future__ import annotations

from typing import get_args

import torch

from cistron_kernels.checks import check_choice, check_floating, check_lengths, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.hyena_fir import reference
from cistron_kernels.hyena_fir.reference import TapOrder

__all__ = ["TapOrder", "gated_fir", "hyena_fir"]

_MOST_TAPS, _MOST_PROJECTION_TAPS = 129, 3
"""What the kernels' tiles reach; PyTorch takes longer filters."""


def hyena_fir(
    x: torch.Tensor,
    taps: torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filter each channel causally and return the inputs that the next call needs.

    Args:
        x: [B, C, L], L >= 1, of any strides; fast where tokens are neighbours.
        taps: [G, K]; group g filters the channels g * C/G up to (g+1) * C/G.
        order: place of the current token's tap: last (`correlation`) or first (`impulse`).
        skip: [G] or [C], adds ``skip * x`` before the result is rounded.
        history: [B, C, K-1], the inputs before `x`; none means zeros.
        lengths: [B] int, real tokens of each right-padded row; none means L.

    Returns:
        y [B, C, L] in the dtype of `x`, computed in fp32 or better, and the last K-1 real inputs [B, C, K-1].

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `order` is none of the two.
    """
    tensors = {"x": x, "taps": taps, "skip": skip, "history": history}
    _check("hyena_fir", x.shape[1] if x.dim() == 3 else 0, lengths, order, tensors)
    if taps.shape[1] <= _MOST_TAPS and takes_triton("hyena_fir", *_present(tensors)):
        from cistron_kernels.hyena_fir import kernel

        if kernel.fits(x):
            return kernel.hyena_fir(x, taps, order, skip, history, lengths)
    return reference.hyena_fir(x, taps, order=order, skip=skip, history=history, lengths=lengths)


def gated_fir(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    taps: torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
    projection_history: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``post_gate * fir(pre_gate * value)`` from a Hyena projection, whose own short filter runs before.

    Args:
        projected: [B, 3D, L], L >= 1, of any strides; fast where tokens are neighbours and L is a multiple of
            `rows.ROW_ALIGNMENT`. The rows of a channel are neighbours: post-gate, pre-gate, value.
        projection_taps: [3D, P], the current token's tap last.
        taps: [G, K]; group g filters the channels g * D/G up to (g+1) * D/G.
        order: place of the current token's tap in `taps`: last (`correlation`) or first (`impulse`).
        skip: [G] or [D], adds ``skip * pre_gate * value`` before the last gate.
        projection_history: [B, 3D, P-1], the projection before `projected`; none means zeros.
        history: [B, D, K-1], the products ``pre_gate * value`` before those of `projected`; none means zeros.
        lengths: [B] int, real tokens of each right-padded row; none means L.

    Returns:
        y [B, D, L] in the dtype of `projected`; the last P-1 real tokens of the projection [B, 3D, P-1] and the last
        K-1 real products [B, D, K-1], for the next call. The kernels round products and result to that dtype, PyTorch
        the outcome of every step.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `order` is none of the two.
    """
    tensors = {"projected": projected, "taps": taps, "skip": skip, "history": history}
    tensors |= {"projection_taps": projection_taps, "projection_history": projection_history}
    if projected.dim() != 3 or projected.shape[1] % 3 or projection_taps.dim() != 2:
        refuse("gated_fir", "projected must be [B, 3D, L] and projection_taps [3D, P]", **tensors)
    batch, rows, _ = projected.shape
    width = projection_taps.shape[1]
    if projection_taps.shape[0] != rows or not width:
        refuse("gated_fir", "projection_taps must be [3D, P] for projected [B, 3D, L]", **tensors)
    if projection_history is not None and projection_history.shape != (batch, rows, width - 1):
        refuse("gated_fir", "projection_history must be [B, 3D, P-1]", **tensors)
    _check("gated_fir", rows // 3, lengths, order, tensors)
    fits = taps.shape[1] <= _MOST_TAPS and width <= _MOST_PROJECTION_TAPS
    if fits and takes_triton("hyena_fir", *_present(tensors)):
        from cistron_kernels.hyena_fir import kernel

        if kernel.fits(projected):
            histories = projection_history, history
            return kernel.gated_fir(projected, projection_taps, taps, order, skip, *histories, lengths)
    return reference.gated_fir(
        projected,
        projection_taps,
        taps,
        order=order,
        skip=skip,
        projection_history=projection_history,
        history=history,
        lengths=lengths,
    )


def _present(tensors: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors.values() if tensor is not None]


def _check(
    op: str, channels: int, lengths: torch.Tensor | None, order: TapOrder, tensors: dict[str, torch.Tensor | None]
) -> None:
    """Refuse what does not fit; the first of `tensors` is the input, of so many channels behind its gates."""
    x, taps, skip, history = list(tensors.values())[:4]
    assert x is not None
    assert taps is not None
    if x.dim() != 3 or not x.shape[2]:
        refuse(op, "the input must be [B, channels, L] with at least one token", **tensors)
    if taps.dim() != 2 or not taps.numel() or channels % taps.shape[0]:
        refuse(op, "taps must be [G, K], and the groups must divide the channels", **tensors)
    if skip is not None and skip.shape not in ((channels,), taps.shape[:1]):
        refuse(op, "skip must have one value per group or per channel", **tensors)
    if history is not None and history.shape != (x.shape[0], channels, taps.shape[1] - 1):
        refuse(op, "history must be [B, channels, K-1]", **tensors)
    check_lengths(op, lengths, x.shape[0], x.shape[2], **tensors)
    check_choice(op, "order", order, get_args(TapOrder), **tensors)
    check_floating(op, **tensors)
    check_same_device(op, **tensors, lengths=lengths)
