"""One token of the Hyena operators in plain PyTorch: the definition of the kernels, and what runs on a CPU.

A step allocates nothing that grows with the state, and moves none of it.
"""

from __future__ import annotations

import torch

from cistron_kernels.hyena_fir import TapOrder


def fir_step(
    x: torch.Tensor,
    taps: torch.Tensor,
    history: torch.Tensor,
    end: int | torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Filter one token [B, C], and write it into the history [B, N, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    groups, width = taps.shape
    window = _with_latest(history, x, end, width)
    per_channel = (taps if order == "correlation" else taps.flip(-1)).t().to(wide)
    if groups < channels:
        per_channel = per_channel.repeat_interleave(channels // groups, dim=1)
    # Whole rows of channels are multiplied at once: with three taps per channel, dot products would cost a call each.
    y = (window.to(wide) * per_channel).sum(dim=1)
    if skip is not None:
        if len(skip) < channels:
            skip = skip.repeat_interleave(channels // len(skip))
        y = torch.addcmul(y, skip.to(wide), x.to(wide))
    return y.to(x.dtype)


def modal_step(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Advance the modal state [B, H, S] by one token [B, H], in place, and read the output from it.

    A slow pole is close to 1, where fp32 is coarse: repeated products with its rounded value would be off by 2e-3 after
    20,000 tokens. So the state is moved by the small number ``exp(log_pole) - 1``, which fp32 holds to full precision.
    """
    change = torch.addcmul(x.to(state.dtype)[..., None], log_poles.to(state.dtype).expm1(), state)
    state += change
    return (state * residues).sum(dim=-1).to(x.dtype)


def gated_fir_step(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    taps: torch.Tensor,
    projection_history: torch.Tensor,
    history: torch.Tensor,
    projection_end: int | torch.Tensor,
    end: int | torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one token of an HCS or HCM layer between its projections, [B, 3D] -> [B, D]."""
    post_gate, gated = _gates(projected, projection_taps, projection_history, projection_end)
    return post_gate * fir_step(gated, taps, history, end, order=order, skip=skip)


def gated_modal_step(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    skip: torch.Tensor,
    projection_history: torch.Tensor,
    state: torch.Tensor,
    projection_end: int | torch.Tensor,
) -> torch.Tensor:
    """Run one token of an HCL layer between its projections, [B, 3D] -> [B, D]."""
    post_gate, gated = _gates(projected, projection_taps, projection_history, projection_end)
    y = modal_step(gated, log_poles, residues, state)
    return post_gate * (y + skip.to(gated.dtype) * gated)


def _gates(
    projected: torch.Tensor, taps: torch.Tensor, history: torch.Tensor, end: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gate behind the operator and the operator's input, both [B, D], after the projection's filter."""
    filtered = fir_step(projected, taps, history, end, order="correlation")
    post_gate, pre_gate, value = filtered.view(len(filtered), -1, 3).unbind(dim=2)
    return post_gate, pre_gate * value


def _with_latest(history: torch.Tensor, x: torch.Tensor, end: int | torch.Tensor, width: int) -> torch.Tensor:
    """Write a token to its slot of the ring, and return the last ones [B, width, C], oldest first."""
    slots = history.shape[1]
    if isinstance(end, int):
        end %= slots
        history[:, end] = x
        if end >= width - 1:
            return history[:, end - width + 1 : end + 1]
        return torch.cat([history[:, end - width + 1 :], history[:, : end + 1]], dim=1)
    rows = torch.arange(len(history), device=history.device)[:, None]
    lags = torch.arange(1 - width, 1, device=history.device)
    wanted = (end[:, None] + lags) % slots
    history[rows, wanted[:, -1:]] = x[:, None].to(history.dtype)
    return history[rows, wanted]
