"""HCL's convolution with a sum of decaying exponentials, by chunks: linear in L, and no filter of length L is built.

Shape legend: B batch, H channels, L length, S poles of a channel, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def modal_scan(
    x: torch.Tensor,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve with ``h[t] = sum_s residues[s] * exp(log_poles[s] * t)``, starting from `state`.

    Args:
        x: [B, H, L], L >= 1.
        log_poles: [H, S], real and negative.
        residues: [H, S].
        state: [B, H, S] after the token before `x`; none means zeros.
        lengths: [B], real tokens of each right-padded row; none means L.
        chunk: tokens per chunk.

    Returns:
        y [B, H, L] in the dtype of `x`, and the state [B, H, S] (fp32 or better) after each row's last real token.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(x.dtype, log_poles.dtype), torch.float32)
        log_poles, residues = log_poles.to(wide), residues.to(wide)
        batch, channels, length = x.shape
        size = min(chunk, length)
        num_chunks = -(-length // size)
        padded = functional.pad(x.to(wide), (0, num_chunks * size - length))
        rows = padded.view(batch, channels, num_chunks, size).transpose(0, 1).reshape(channels, -1, size)

        # Powers as exp(k log pole): pole**k from a rounded pole loses two digits at 8k tokens and three at 131k.
        powers = (log_poles[..., None] * torch.arange(size + 1, device=x.device, dtype=wide)).exp()
        taps = torch.einsum("hs,hsc->hc", residues, powers[..., :size])
        updates = torch.bmm(rows, powers[..., :size].flip(-1).transpose(1, 2))
        initial = x.new_zeros(batch, channels, log_poles.shape[1], dtype=wide) if state is None else state.to(wide)
        updates = updates.view(channels, batch, num_chunks, -1)
        # A slow pole survives thousands of chunks, each of which would repeat the rounding of its power: fp64 here.
        decay = (log_poles.double() * size).exp()
        states = _Recurrence.apply(decay, updates, initial.transpose(0, 1))  # type: ignore[no-untyped-call]
        before = states[:, :, :num_chunks].reshape(channels, batch * num_chunks, -1)
        y = torch.bmm(rows, _toeplitz(taps).transpose(1, 2))
        y = torch.baddbmm(y, before, residues[..., None] * powers[..., 1:])
        y = y.view(channels, batch, num_chunks * size).transpose(0, 1)[..., :length]
        return y.to(x.dtype), _final_state(padded, states, log_poles, powers[..., :size], length, lengths)


class _Recurrence(torch.autograd.Function):
    """``states[i + 1] = decay * states[i] + updates[i]``, carried in fp64 and kept in the dtype of the updates."""

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, updates: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Return [H, B, n+1, S] from decay [H, S], updates [H, B, n, S] and the initial state [H, B, S]."""
        channels, batch, num_chunks, poles = updates.shape
        states = updates.new_empty(channels, batch, num_chunks + 1, poles)
        states[:, :, 0] = initial
        carry = initial.double()
        for i in range(num_chunks):
            carry = torch.addcmul(updates[:, :, i], decay[:, None], carry)
            states[:, :, i + 1] = carry
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the adjoint recurrence from the last chunk to the first."""
        decay, states = ctx.saved_tensors
        adjoint = grad.clone()
        carry = grad[:, :, -1].double()
        for i in reversed(range(grad.shape[2] - 1)):
            carry = torch.addcmul(grad[:, :, i], decay[:, None], carry)
            adjoint[:, :, i] = carry
        grad_decay = (adjoint[:, :, 1:] * states[:, :, :-1]).sum(dim=(1, 2)).to(decay.dtype)
        return grad_decay, adjoint[:, :, 1:], adjoint[:, :, 0]


def _toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """Return [H, C, C] with ``taps[i - j]`` at row i and column j, zero above the diagonal."""
    size = taps.shape[-1]
    return functional.pad(taps.flip(-1), (0, size - 1)).unfold(-1, size, 1).flip(1)


def _final_state(
    padded: torch.Tensor,
    states: torch.Tensor,
    log_poles: torch.Tensor,
    powers: torch.Tensor,
    length: int,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Return [B, H, S]: the state before each row's unfinished chunk, moved on by the real tokens of that chunk."""
    batch, channels, size = *padded.shape[:2], powers.shape[-1]
    if lengths is None:
        lengths = torch.full((batch,), length, device=padded.device)
    whole, rest = lengths // size, lengths % size
    # Right-aligned at the row's end, the unfinished chunks of all rows meet the same powers.
    index = lengths[:, None] - size + torch.arange(size, device=padded.device)
    real = (index >= (whole * size)[:, None])[:, None]
    tail = padded.gather(-1, index.clamp(min=0)[:, None].expand(-1, channels, -1))
    tail = torch.where(real, tail, 0.0)
    before = states.transpose(0, 1)[torch.arange(batch, device=padded.device), :, whole]
    decayed = before * (log_poles * rest[:, None, None]).exp()
    return decayed + torch.einsum("bhc,hsc->bhs", tail, powers.flip(-1))
