"""One token of `hyena_fir` and `modal_scan`: what generation runs per layer and step."""

from __future__ import annotations

import torch

from cistron_kernels.hyena_fir import TapOrder


def fir_step(
    x: torch.Tensor,
    taps: torch.Tensor,
    history: torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filter one token and shift the history.

    Args:
        x: [B, C].
        taps: [G, K].
        order: place of the current token's tap: last (`correlation`) or first (`impulse`).
        history: [B, C, K-1], the inputs before this one, zeros before the first.
        skip: [G] or [C], adds ``skip * x``.

    Returns:
        y [B, C] in the dtype of `x`, and the next history [B, C, K-1].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, channels = x.shape
    groups, width = taps.shape
    window = torch.cat([history.to(x.dtype), x[..., None]], dim=-1)
    current_last = (taps if order == "correlation" else taps.flip(-1)).to(wide)
    grouped = window.to(wide).view(batch, groups, channels // groups, width)
    y = (grouped @ current_last[..., None]).view(batch, channels)
    if skip is not None:
        y = y + skip.to(wide).repeat_interleave(channels // skip.shape[0]) * x
    return y.to(x.dtype), window[..., 1:].contiguous()


def modal_step(
    x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance the modal state by one token and read the output from it.

    Args:
        x: [B, H].
        log_poles: [H, S].
        residues: [H, S].
        state: [B, H, S].

    Returns:
        y [B, H] in the dtype of `x`, and the next state [B, H, S].
    """
    state = torch.addcmul(x.to(state.dtype)[..., None], log_poles.to(state.dtype).exp(), state)
    return (state * residues).sum(dim=-1).to(x.dtype), state
