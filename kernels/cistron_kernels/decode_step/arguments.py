"""What steps ask of their arguments. They run thousands of times a second: messages are made on failure only."""

from __future__ import annotations

from typing import NoReturn, get_args

import torch

from cistron_kernels.checks import INDEX_DTYPES, check_choice, refuse
from cistron_kernels.hyena_fir import TapOrder


def check_ring(op: str, x: torch.Tensor, taps: torch.Tensor, history: torch.Tensor, end: int | torch.Tensor) -> None:
    """Raise ValueError unless token, taps, history and slot belong together."""

    def no(problem: str) -> NoReturn:
        refuse(op, problem, x=x, taps=taps, history=history, end=end if isinstance(end, torch.Tensor) else None)

    if x.dim() != 2 or taps.dim() != 2 or history.dim() != 3:
        no("a token is [B, C], taps are [G, K] and a history is [B, N, C]")
    rows, slots, _ = history.shape
    if rows != x.shape[0] or not 0 < taps.shape[1] <= slots:
        no("a history must have the rows of the token and at least as many slots as there are taps")
    if history.stride(2) != 1:
        no("the channels of a history must be contiguous: it is updated in place")
    if not x.device == taps.device == history.device:
        no("all tensors must be on one device")
    if not (x.is_floating_point() and taps.is_floating_point() and history.is_floating_point()):
        no("token, taps and history must be floating-point numbers")
    if not isinstance(end, torch.Tensor):
        if not isinstance(end, int) or end < 0:
            no(f"end must be an int and must not be negative: {end}")
    elif end.dtype not in INDEX_DTYPES or end.shape not in ((1,), (rows,)) or end.device != x.device:
        no("end must be an int, or an integer tensor [1] or [B] on the device of the token")


def check_projection(op: str, projected: torch.Tensor, taps: torch.Tensor, history: torch.Tensor) -> None:
    """Raise ValueError unless each of the 3D columns has taps and a place in the history of its own."""
    columns = projected.shape[1]
    if columns % 3 or taps.shape[0] != columns or history.shape[2] != columns:
        tensors = {"projected": projected, "projection_taps": taps, "projection_history": history}
        refuse(op, "projected must be [B, 3D], its taps [3D, Kp] and its history [B, Np, 3D]", **tensors)


def check_filter(
    op: str,
    x: torch.Tensor,
    channels: int,
    taps: torch.Tensor,
    skip: torch.Tensor | None,
    history: torch.Tensor,
    order: TapOrder,
) -> None:
    """Raise ValueError unless there is such an order, and the groups of a filter divide the channels of its history."""
    groups = taps.shape[0]
    check_choice(op, "order", order, get_args(TapOrder), x=x, taps=taps)
    if history.shape[2] != channels or not groups or channels % groups:
        tensors = {"x": x, "taps": taps, "history": history, "skip": skip}
        refuse(op, f"taps [G, K] must have a G that divides the {channels} channels of the history", **tensors)
    if skip is not None and (
        skip.shape not in ((groups,), (channels,)) or skip.device != x.device or not skip.is_floating_point()
    ):
        refuse(op, f"skip must be [{groups}] or [{channels}] floating-point numbers", x=x, taps=taps, skip=skip)


def check_modal(
    op: str,
    x: torch.Tensor,
    channels: int,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    skip: torch.Tensor | None,
    state: torch.Tensor,
) -> None:
    """Raise ValueError unless poles, residues, skip and state belong together."""

    def no(problem: str) -> NoReturn:
        refuse(op, problem, x=x, log_poles=log_poles, residues=residues, skip=skip, state=state)

    if x.dim() != 2 or log_poles.dim() != 2 or log_poles.shape[0] != channels or residues.shape != log_poles.shape:
        no(f"log_poles and residues must be [{channels}, S] for a token [B, ...]")
    if state.shape != (x.shape[0], *log_poles.shape) or (skip is not None and skip.shape != (channels,)):
        no(f"state must be [B, {channels}, S], and skip [{channels}]")
    if state.stride(2) != 1 or state.stride(1) != state.shape[2]:
        no("the state of a row must be contiguous: it is updated in place")
    if not x.device == log_poles.device == residues.device == state.device or (
        skip is not None and skip.device != x.device
    ):
        no("all tensors must be on one device")
    if not (
        x.is_floating_point()
        and log_poles.is_floating_point()
        and residues.is_floating_point()
        and state.is_floating_point()
        and (skip is None or skip.is_floating_point())
    ):
        no("floating-point numbers are needed")
