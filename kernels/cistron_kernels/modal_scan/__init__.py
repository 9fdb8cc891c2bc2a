"""Long convolution by a chunked scan over real poles, alone or between the filter and the gates of a Hyena layer."""

from __future__ import annotations

import torch

from cistron_kernels.checks import check_floating, check_lengths, check_same_device, refuse
from cistron_kernels.dispatch import takes_triton
from cistron_kernels.hyena_fir import hyena_fir
from cistron_kernels.hyena_fir.reference import split_projection
from cistron_kernels.modal_scan import reference
from cistron_kernels.rows import last_inputs

__all__ = ["gated_modal_scan", "modal_scan"]


def modal_scan(
    x: torch.Tensor,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    chunk: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve with ``h[t] = sum_s residues[s] * exp(log_poles[s] * t)``, starting from `state`.

    Args:
        x: [B, H, L], L >= 1; kernels copy it unless neighbouring tokens are neighbours in memory, and L and the other
            strides are multiples of `rows.ROW_ALIGNMENT`.
        log_poles: [H, S], real and negative.
        residues: [H, S].
        state: [B, H, S] after the token before `x`; none means zeros.
        lengths: [B], real tokens of each right-padded row; none means L.
        chunk: tokens per chunk of the reference; the kernels have their own.

    Returns:
        y [B, H, L] in the dtype of `x`, and the state [B, H, S] (fp32 or better) after each row's last real token.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 3 or x.shape[2] < 1 or chunk < 1:
        refuse("modal_scan", "x must be [B, H, L] with L >= 1, in chunks of at least one token", x=x)
    _check("modal_scan", x, x.shape[1], log_poles, residues, state, lengths)
    if takes_triton("modal_scan", x, log_poles, residues, *(() if state is None else (state,))):
        from cistron_kernels.modal_scan import kernel

        y, final, *_ = kernel.modal_scan(x, log_poles, residues, state, lengths)
        return y, final
    return reference.modal_scan(x, log_poles, residues, state=state, lengths=lengths, chunk=chunk)


def gated_modal_scan(
    projected: torch.Tensor,
    projection_taps: torch.Tensor,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    skip: torch.Tensor,
    *,
    projection_history: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filter a channel's three projected rows, scan the product of two, and gate the result with the first.

    With a, b, c the rows 3h, 3h + 1, 3h + 2 of `projected` behind their own causal filters,
    ``y[h] = a * (scan(b * c) + skip[h] * b * c)``.

    Args:
        projected: [B, 3H, L], L >= 1: post-gate, pre-gate and value of channel 0, then those of channel 1, and so on;
            copied as `modal_scan` does.
        projection_taps: [3H, K], the current token's tap last.
        log_poles: [H, S], real and negative.
        residues: [H, S].
        skip: [H].
        projection_history: [B, 3H, K-1], the projected inputs before these; none means zeros.
        state: [B, H, S] after the token before; none means zeros.
        lengths: [B], real tokens of each right-padded row; none means L.

    Returns:
        y [B, H, L] in the dtype of `projected`; then, up to each row's last real token, the last K-1 projected inputs
        [B, 3H, K-1], and the state [B, H, S] (fp32 or better).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    op, channels = "gated_modal_scan", log_poles.shape[0] if log_poles.dim() else 0
    if projected.dim() != 3 or projected.shape[2] < 1 or projected.shape[1] != 3 * channels:
        refuse(
            op, "projected must be [B, 3H, L], L >= 1, for log_poles [H, S]", projected=projected, log_poles=log_poles
        )
    gates = {"projection_taps": projection_taps, "skip": skip, "projection_history": projection_history}
    if projection_taps.dim() != 2 or len(projection_taps) != 3 * channels or skip.shape != (channels,):
        refuse(op, "projection_taps must be [3H, K] and skip [H]", projected=projected, **gates)
    past = (*projected.shape[:2], projection_taps.shape[1] - 1)
    if projection_history is not None and projection_history.shape != past:
        refuse(op, "projection_history must be [B, 3H, K-1]", projected=projected, **gates)
    check_floating(op, **gates)
    check_same_device(op, projected=projected, **gates)
    _check(op, projected, channels, log_poles, residues, state, lengths)
    given = [tensor for tensor in (projection_taps, skip, projection_history, state) if tensor is not None]
    if takes_triton("modal_scan", projected, log_poles, residues, *given):
        from cistron_kernels.modal_scan import kernel

        if kernel.fuses(projected, projection_taps):
            arguments = log_poles, residues, state, lengths, projection_taps, skip, projection_history
            y, final, *_ = kernel.modal_scan(projected, *arguments)
            return y, last_inputs(projected, projection_history, lengths, past[-1]), final
    filtered, history = hyena_fir(
        projected, projection_taps, order="correlation", history=projection_history, lengths=lengths
    )
    post_gate, pre_gate, value = split_projection(filtered)
    x = pre_gate * value
    y, final = modal_scan(x, log_poles, residues, state=state, lengths=lengths)
    return post_gate * (y + skip.to(x.dtype)[:, None] * x), history, final


def _check(
    op: str,
    x: torch.Tensor,
    channels: int,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    state: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> None:
    tensors = {"x": x, "log_poles": log_poles, "residues": residues, "state": state}
    if log_poles.dim() != 2 or len(log_poles) != channels or residues.shape != log_poles.shape:
        refuse(op, "log_poles and residues must be [H, S]", **tensors)
    if state is not None and state.shape != (len(x), *log_poles.shape):
        refuse(op, "state must be [B, H, S]", **tensors)
    check_lengths(op, lengths, x.shape[0], x.shape[2], **tensors)
    check_floating(op, **tensors)
    check_same_device(op, **tensors, lengths=lengths)
