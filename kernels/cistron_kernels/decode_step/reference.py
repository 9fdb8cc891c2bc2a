"""One token of `hyena_fir` and `modal_scan`: what generation runs per layer and step.

Both update the state that they are given in place: a step allocates nothing that grows with the state, and moves none
of it.
"""

from __future__ import annotations

import torch

from cistron_kernels.hyena_fir import TapOrder


def fir_step(
    x: torch.Tensor,
    taps: torch.Tensor,
    history: torch.Tensor,
    end: int,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Filter one token, and write it into the history.

    Args:
        x: [B, C].
        taps: [G, K].
        history: [B, N, C], time before channels; the K-1 inputs before this one stand in the slots up to `end`, zeros
            before the first. `x` is written to slot `end`.
        end: from K-1 to N-1.
        order: place of the current token's tap: last (`correlation`) or first (`impulse`).
        skip: [G] or [C], adds ``skip * x``.

    Returns:
        y [B, C] in the dtype of `x`, computed in fp32 or better.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1]
    groups, width = taps.shape
    history[:, end] = x
    window = history[:, end - width + 1 : end + 1]
    current_last = taps if order == "correlation" else taps.flip(-1)
    # Whole rows of channels are multiplied at once: with three taps per channel, dot products would cost a call each.
    per_channel = current_last.t().to(wide).repeat_interleave(channels // groups, dim=1)
    y = (window.to(wide) * per_channel).sum(dim=1)
    if skip is not None:
        y = torch.addcmul(y, skip.to(wide).repeat_interleave(channels // skip.shape[0]), x.to(wide))
    return y.to(x.dtype)


def modal_step(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Advance the modal state by one token, in place, and read the output from it.

    A slow pole is close to 1, where fp32 is coarse: repeated products with its rounded value would be off by 2e-3 after
    20,000 tokens. So the state is moved by the small number ``exp(log_pole) - 1``, which fp32 holds to full precision.

    Args:
        x: [B, H].
        log_poles: [H, S].
        residues: [H, S].
        state: [B, H, S].

    Returns:
        y [B, H] in the dtype of `x`.
    """
    change = torch.addcmul(x.to(state.dtype)[..., None], log_poles.to(state.dtype).expm1(), state)
    state += change
    return (state * residues).sum(dim=-1).to(x.dtype)
