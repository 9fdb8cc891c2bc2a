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
_NARROW = 4
"""Taps up to which conv1d's own gradient is as fast."""


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
        correlated = _correlated if width <= _NARROW else _Correlated.apply
        y = correlated(window.to(wide), current_last.to(wide))
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


def _correlated(window: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Correlate [B, C, K-1+L] with [G, K] into [B, C, L]."""
    channels = window.shape[1]
    return functional.conv1d(window, per_channel(taps, channels)[:, None], groups=channels)


class _Correlated(torch.autograd.Function):
    """The same with a gradient of the taps by matrix products: conv1d's is several times slower at 128 taps on CPU."""

    @staticmethod
    def forward(ctx: Any, window: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        """Correlate [B, C, K-1+L] with [G, K] into [B, C, L]."""
        ctx.save_for_backward(window, taps)
        return _correlated(window, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of the window (a full convolution) and of the taps (a lag correlation)."""
        window, taps = ctx.saved_tensors
        margin = taps.shape[1] - 1
        grad_window = grad_taps = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_window = _correlated(functional.pad(grad, (margin, margin)), taps.flip(-1))
            if ctx.needs_input_grad[1]:
                grad_taps = _lag_correlation(grad, window, *taps.shape)
        return grad_window, grad_taps


def _lag_correlation(grad: torch.Tensor, window: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Return [G, K]: the sums over rows b, channels c of a group and tokens t of ``grad[b,c,t] * window[b,c,t+k]``.

    Chunks of the gradient times the chunks of the window that they meet, summed over chunks, channels and rows, give
    one matrix per group; its diagonals are the lags.
    """
    batch, channels, length = grad.shape
    beyond = -(-(width - 1) // _CHUNK)  # Chunks of the window that a chunk meets after the one at its own place.
    chunks = -(-length // _CHUNK) + beyond
    left = functional.pad(grad, (0, chunks * _CHUNK - length)).view(batch, groups, -1, _CHUNK)
    # What a channel's last chunks meet is the next channel's: their gradient is zero, as is what the last one meets.
    count = channels * chunks
    right = grad.new_zeros(batch * count + beyond, _CHUNK)
    right[: batch * count].view(batch, channels, -1)[..., : window.shape[-1]] = window
    products = grad.new_zeros(groups, _CHUNK, (beyond + 1) * _CHUNK)
    for row in range(batch):
        for chunk, product in enumerate(torch.split(products, _CHUNK, dim=-1)):
            met = right[row * count + chunk : (row + 1) * count + chunk].view(groups, -1, _CHUNK)
            product += torch.bmm(left[row].mT, met)
    reach = products.shape[-1]
    return products.as_strided((groups, _CHUNK, width), (_CHUNK * reach, reach + 1, 1)).sum(dim=1)


def per_channel(grouped: torch.Tensor, channels: int) -> torch.Tensor:
    """Repeat the entries of each group for its channels, [G, ...] -> [C, ...]."""
    return grouped.repeat_interleave(channels // grouped.shape[0], dim=0)


def _last_inputs(window: torch.Tensor, lengths: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the `count` inputs up to each row's own last real token, as a copy that frees the window."""
    if lengths is None:
        return window[..., window.shape[-1] - count :].clone()
    index = lengths[:, None] + torch.arange(count, device=window.device)
    return window.gather(-1, index[:, None].expand(-1, window.shape[1], -1))
