"""One token through a Hyena operator's state: what generation runs per layer and step.

The last inputs of a finite filter stand in a ring: a history [B, N, C], time before channels, with N at least the
filter's width K. A step writes its token to slot ``end % N`` and reads the K-1 slots before it, around the end of the
ring; they hold zeros before the first token. `end` may be

- an int: all rows write the same slot;
- an integer tensor [1] or [B] on the device of the token: the slot, or each row's own. Kernels read it when they run,
  so a captured CUDA graph steps on when the tensor is incremented, and rows that have read different numbers of tokens
  share a batch. A row's number of tokens read serves all its rings, whatever their N.

States are updated in place. Steps have no gradient: on a GPU, backward raises.
"""

from __future__ import annotations

import torch

from cistron_kernels.decode_step import reference
from cistron_kernels.decode_step.arguments import check_filter, check_modal, check_projection, check_ring
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.hyena_fir import TapOrder

__all__ = ["fir_step", "gated_fir_step", "gated_modal_step", "modal_step"]


def fir_step(
    x: torch.Tensor,
    taps: torch.Tensor,
    history: torch.Tensor,
    end: int | torch.Tensor,
    *,
    order: TapOrder,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Filter one token, and write it into the history.

    Args:
        x: [B, C].
        taps: [G, K]; group g filters the channels g * C/G up to (g+1) * C/G.
        history: [B, N, C], a ring of inputs with N >= K.
        end: slot of this token, modulo N: int, or int tensor [1] or [B].
        order: place of the current token's tap: last (`correlation`) or first (`impulse`).
        skip: [G] or [C], adds ``skip * x``.

    Returns:
        y [B, C] in the dtype of `x`, computed in fp32 or better.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_ring("fir_step", x, taps, history, end)
    check_filter("fir_step", x, x.shape[1], taps, skip, history, order)
    if takes_triton("decode_step", x, taps, history, *(() if skip is None else (skip,))):
        from cistron_kernels.decode_step import kernel

        return kernel.fir_step(x, taps, history, *_split(end), order == "impulse", skip)
    return reference.fir_step(x, taps, history, end, order=order, skip=skip)


def modal_step(x: torch.Tensor, log_poles: torch.Tensor, residues: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Advance the modal state by one token, in place, and read the output from it.

    Args:
        x: [B, H].
        log_poles: [H, S].
        residues: [H, S].
        state: [B, H, S].

    Returns:
        y [B, H] in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_modal("modal_step", x, x.shape[-1] if x.dim() else 0, log_poles, residues, None, state)
    if takes_triton("decode_step", x, log_poles, residues, state):
        from cistron_kernels.decode_step import kernel

        return kernel.modal_step(x, log_poles, residues, state)
    return reference.modal_step(x, log_poles, residues, state)


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
    """Run one token of an HCS or HCM layer between its two projections: short filter, gate, filter, gate.

    Args:
        projected: [B, 3D]; a channel's post-gate, pre-gate and value are neighbours.
        projection_taps: [3D, Kp], the current token's last.
        taps: [G, K], as in `fir_step`.
        projection_history: [B, Np, 3D], the ring of the projected inputs.
        history: [B, N, D], the ring of the gated inputs.
        projection_end: slot of this token in `projection_history`, as `end`.
        end: slot of this token in `history`, modulo N: int, or int tensor [1] or [B].
        order: as in `fir_step`, of `taps`.
        skip: [G] or [D], as in `fir_step`.

    Returns:
        y [B, D] in the dtype of `projected`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    op = "gated_fir_step"
    check_ring(op, projected, projection_taps, projection_history, projection_end)
    check_projection(op, projected, projection_taps, projection_history)
    check_ring(op, projected, taps, history, end)
    check_filter(op, projected, projected.shape[1] // 3, taps, skip, history, order)
    tensors = (projected, projection_taps, taps, projection_history, history)
    if takes_triton("decode_step", *tensors, *(() if skip is None else (skip,))):
        from cistron_kernels.decode_step import kernel

        return kernel.gated_fir_step(*tensors, *_split(projection_end), *_split(end), order == "impulse", skip)
    return reference.gated_fir_step(*tensors, projection_end, end, order=order, skip=skip)


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
    """Run one token of an HCL layer between its two projections: short filter, gate, modal filter with skip, gate.

    Args:
        projected: [B, 3D]; a channel's post-gate, pre-gate and value are neighbours.
        projection_taps: [3D, Kp], the current token's last.
        log_poles: [D, S].
        residues: [D, S].
        skip: [D], adds ``skip`` times the gated input.
        projection_history: [B, Np, 3D], the ring of the projected inputs.
        state: [B, D, S], the modal state.
        projection_end: slot of this token in `projection_history`, modulo Np: int, or int tensor [1] or [B].

    Returns:
        y [B, D] in the dtype of `projected`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    op = "gated_modal_step"
    check_ring(op, projected, projection_taps, projection_history, projection_end)
    check_projection(op, projected, projection_taps, projection_history)
    check_modal(op, projected, projected.shape[1] // 3, log_poles, residues, skip, state)
    tensors = (projected, projection_taps, log_poles, residues, skip, projection_history, state)
    if takes_triton("decode_step", *tensors):
        from cistron_kernels.decode_step import kernel

        return kernel.gated_modal_step(*tensors, *_split(projection_end))
    return reference.gated_modal_step(*tensors, projection_end)


def _split(end: int | torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Return a slot as the kernels take it: in a tensor or, without one, as a number."""
    return (None, end) if isinstance(end, int) else (end, 0)
