"""Rows of tokens as the Hyena convolutions hold them: [B, C, L], and what one call leaves for the next."""

from __future__ import annotations

from typing import Final

import torch

ROW_ALIGNMENT: Final = 16
"""Rows of so many tokens, or of a multiple, are read where they lie; the kernels copy others first."""


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, C, L], or a copy of it that ends in zeros, with rows that can be read 16 bytes at a time."""
    length = x.shape[2]
    whole = not any(size % ROW_ALIGNMENT for size in (length, x.stride(0), x.stride(1), x.data_ptr()))
    if x.stride(2) == 1 and whole:
        return x
    copy = empty_rows(x, x.shape[1])
    copy[..., length:] = 0
    copy[..., :length] = x
    return copy


def empty_rows(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Return [B, channels, L] to be filled, for x [B, C, L] and the next aligned L.

    Channels are outermost: a matrix product over all B L tokens takes and gives this without a copy.
    """
    length = -(-x.shape[2] // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return x.new_empty(channels, x.shape[0], length).transpose(0, 1)


def last_inputs(
    x: torch.Tensor, history: torch.Tensor | None, lengths: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Return the inputs [B, C, count] up to each row's own last real token, `history` and then zeros before them.

    Args:
        x: [B, C, L].
        history: [B, C, N], the inputs before `x`.
        lengths: [B], real tokens of each row; none means L.
        count: how many.
    """
    batch, channels, length = x.shape
    if lengths is None and length >= count:
        return x[..., length - count :].clone()
    past = x.new_zeros(batch, channels, count)
    if history is not None and (known := min(count, history.shape[-1])):
        past = torch.cat([past[..., known:], history[..., history.shape[-1] - known :].to(x.dtype)], dim=-1)
    if lengths is None:
        return torch.cat([past[..., length:], x], dim=-1)
    index = (lengths[:, None] + torch.arange(-count, 0, device=x.device))[:, None].expand(-1, channels, -1)
    before = past.gather(-1, (index + count).clamp(max=count - 1))
    return torch.where(index < 0, before, x.gather(-1, index.clamp(min=0)))
