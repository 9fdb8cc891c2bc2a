"""Causal finite filters, depthwise or shared by groups of channels, that can start in the middle of a sequence.

Both tap orders of the published checkpoints exist, because confusing them gives a model that runs and is wrong:
`correlation` stores the tap of the current token last (projection filter, HCS), `impulse` stores it first (HCM).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

TapOrder: TypeAlias = Literal["correlation", "impulse"]

_CHUNK = 32
"""Tokens per row of the matrix product that yields the gradient of the taps."""


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
        x: [B, C, L], L >= 1.
        taps: [G, K]; group g filters the channels g * C/G up to (g+1) * C/G.
        order: place of the current token's tap: last (`correlation`) or first (`impulse`).
        skip: [G] or [C], adds ``skip * x`` before the result is rounded.
        history: [B, C, K-1], the inputs before `x`; none means zeros.
        lengths: [B], real tokens of each right-padded row; none means L.

    Returns:
        y [B, C, L] in the dtype of `x`, computed in fp32 or better, and the last K-1 real inputs [B, C, K-1].
    """
    with torch.autocast(x.device.type, enabled=False):
        channels, width = x.shape[1], taps.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        past = x.new_zeros(*x.shape[:2], width - 1) if history is None else history.to(x.dtype)
        window = torch.cat([past, x], dim=-1)
        current_last = taps if order == "correlation" else taps.flip(-1)
        y: torch.Tensor = _CausalFir.apply(window.to(wide), per_channel(current_last, channels).to(wide))  # type: ignore[no-untyped-call]
        if skip is not None:
            y = torch.addcmul(y, per_channel(skip, channels).to(wide)[:, None], x.to(wide))
        return y.to(x.dtype), _last_inputs(window, lengths, width - 1)


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
    """Filter the projection, gate, filter, gate; return y [B, D, L] and the last inputs of both filters."""
    filtered, projection_history = hyena_fir(
        projected, projection_taps, order="correlation", history=projection_history, lengths=lengths
    )
    post_gate, pre_gate, value = split_projection(filtered)
    y, history = hyena_fir(pre_gate * value, taps, order=order, skip=skip, history=history, lengths=lengths)
    return post_gate * y, projection_history, history


def split_projection(projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return post-gate, pre-gate and value, each [B, D, L]: the three neighbouring rows of every channel."""
    batch, rows, length = projected.shape
    return projected.view(batch, rows // 3, 3, length).unbind(dim=2)


class _CausalFir(torch.autograd.Function):
    """Depthwise correlation without padding; its backward pass is several times faster than conv1d's on CPU."""

    @staticmethod
    def forward(ctx: Any, window: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        """Correlate [B, C, K-1+L] with [C, K] into [B, C, L]."""
        ctx.save_for_backward(window, taps)
        return functional.conv1d(window, taps[:, None], groups=taps.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of the window (a full convolution) and of the taps (a lag correlation)."""
        window, taps = ctx.saved_tensors
        margin = taps.shape[1] - 1
        grad_window = grad_taps = None
        if ctx.needs_input_grad[0]:
            padded = functional.pad(grad, (margin, margin))
            grad_window = functional.conv1d(padded, taps.flip(-1)[:, None], groups=taps.shape[0])
        if ctx.needs_input_grad[1]:
            grad_taps = _lag_correlation(grad, window, taps.shape[1])
        return grad_window, grad_taps


def _lag_correlation(grad: torch.Tensor, window: torch.Tensor, width: int) -> torch.Tensor:
    """Return [C, K]: the sum over rows b and tokens t of ``grad[b, :, t] * window[b, :, t + k]``.

    Chunks of the gradient times the stretch of the window that they meet, summed over chunks, give one matrix per
    channel; its diagonals are the lags.
    """
    batch, channels, length = grad.shape
    num_chunks = -(-length // _CHUNK)
    fill = num_chunks * _CHUNK - length
    reach = _CHUNK + width - 1
    left = functional.pad(grad, (0, fill)).view(batch, channels, num_chunks, _CHUNK)
    right = functional.pad(window, (0, fill)).unfold(-1, reach, _CHUNK)
    left = left.transpose(0, 1).reshape(channels, batch * num_chunks, _CHUNK)
    right = right.transpose(0, 1).reshape(channels, batch * num_chunks, reach)
    products = torch.bmm(left.transpose(1, 2), right)
    return products.as_strided((channels, _CHUNK, width), (_CHUNK * reach, reach + 1, 1)).sum(dim=1)


def per_channel(grouped: torch.Tensor, channels: int) -> torch.Tensor:
    """Repeat the entries of each group for its channels, [G, ...] -> [C, ...]."""
    return grouped.repeat_interleave(channels // grouped.shape[0], dim=0)


def _last_inputs(window: torch.Tensor, lengths: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the `count` inputs up to each row's own last real token, as a copy that frees the window."""
    if lengths is None:
        return window[..., window.shape[-1] - count :].clone()
    index = lengths[:, None] + torch.arange(count, device=window.device)
    return window.gather(-1, index[:, None].expand(-1, window.shape[1], -1))
