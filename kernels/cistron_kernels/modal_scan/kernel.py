"""The modal scan's Triton kernels as operators of torch, with or without the filter and the gates around the scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import on_device, operand_dtype
from cistron_kernels.modal_scan.backward import backward_kernel
from cistron_kernels.modal_scan.forward import forward_kernel
from cistron_kernels.rows import aligned, empty_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Chunks that a program takes at once, their tokens, its warps, and how many tiles are on their way from memory."""

    rows: int
    chunk: int
    warps: int = 4
    stages: int = 1


# For the forward and the backward kernel: the largest that leave no thread short of registers.
INTERPRETED: Final = (Tile(4, 16), Tile(4, 16))  # Small: the interpreter goes through scans number by number.
HOPPER: Final = (Tile(64, 64, stages=2), Tile(64, 64, warps=8))
BLACKWELL: Final = (Tile(64, 64, stages=2), Tile(64, 32, warps=8))
OTHERS: Final = (Tile(64, 32), Tile(32, 32))  # Their matrix instructions take operands from registers.
FP32: Final = (Tile(16, 32), Tile(16, 32))


def fuses(x: Tensor, taps: Tensor) -> bool:
    """Return whether the kernels take the filter and the gates as well: three taps, and on a GPU 16-bit tokens.

    An fp32 product takes three, of operands in parts: with the filters' gradients beside it, registers do not suffice.
    """
    return taps.shape[1] == 3 and not (x.is_cuda and x.dtype == torch.float32)


@torch.library.custom_op("cistron::modal_scan", mutates_args=())
def modal_scan(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    taps: Tensor | None = None,
    skip: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [B, H, L], the final state [B, H, S]; and for the gradient its slope, and states carried on the way.

    With `taps`, x holds projected rows [B, 3H, L], and the scan stands between the filter and the gates; `skip` belongs
    to these. Arguments are checked by the package's functions.
    """
    forward, backward = _tiles(x)
    options = _options(x, log_poles, residues, lengths, taps, skip, history)
    y, final, slope, carried = _empty_outputs(x, log_poles)
    if y.numel():
        with on_device(x):
            forward_kernel[(y.shape[0] * y.shape[1],)](
                **options, state_ptr=x if state is None else state.float().contiguous(), STATE=state is not None,
                **_placed("y", y), carry_ptr=carried, final_ptr=final, slope_ptr=slope,
                KEEP=backward.rows * backward.chunk, **_constants(x, forward),
            )  # fmt: skip
    return y, final, slope, carried


@torch.library.custom_op("cistron::modal_scan_backward", mutates_args=())
def modal_scan_backward(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    lengths: Tensor | None,
    taps: Tensor | None,
    skip: Tensor | None,
    history: Tensor | None,
    slope: Tensor,
    carried: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, log poles, residues, initial state, taps, skip and history; empty for the absent."""
    grads = _empty_gradients(x, log_poles, taps, history)
    options, tile = _options(x, log_poles, residues, lengths, taps, skip, history), _tiles(x)[1]
    if grad_y.numel():
        with on_device(x):
            backward_kernel[(grad_y.shape[0] * grad_y.shape[1],)](
                **options, carry_ptr=carried, **_placed("grad_y", aligned(grad_y)), **_placed("grad_x", grads["x"]),
                grad_final_ptr=x if grad_final is None else grad_final.contiguous(), FINAL=grad_final is not None,
                **{f"grad_{name}_ptr": grad for name, grad in grads.items() if name != "x"},
                KEEP=tile.rows * tile.chunk, **_constants(x, tile),
            )  # fmt: skip
    if grad_final is not None:
        grads["log_poles"].addcmul_(grad_final, slope)
    over_batch = {"log_poles": log_poles, "residues": residues, "taps": taps, "skip": skip}
    for name, like in over_batch.items():
        if like is not None:
            grads[name] = grads[name].sum(0).to(like.dtype).view_as(like)
    return _in_order(grads)


def _options(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    lengths: Tensor | None,
    taps: Tensor | None,
    skip: Tensor | None,
    history: Tensor | None,
) -> dict[str, Any]:
    """Return what both kernels take; x stands for absent tensors, which none reads."""
    real, x = x.shape[2], aligned(x)
    return {
        **_placed("x", x),
        "history_ptr": x if history is None else history.to(x.dtype).contiguous(),
        "taps_ptr": x if taps is None else taps.contiguous(),
        "skip_ptr": x if skip is None else skip.contiguous(),
        "log_poles_ptr": log_poles.float().contiguous(),
        "residues_ptr": residues.float().contiguous(),
        "lengths_ptr": x if lengths is None else lengths.contiguous(),
        "channels": log_poles.shape[0],
        "length": x.shape[2],
        "real": real,
        "poles": log_poles.shape[1],
        "GATED": taps is not None,
        "HISTORY": history is not None,
        "LENGTHS": lengths is not None,
        "POLES": max(16 if x.is_cuda else 1, triton.next_power_of_2(log_poles.shape[1])),
    }


def _placed(name: str, x: Tensor) -> dict[str, Any]:
    """Return a tensor's place in memory, under its name in the kernels."""
    return {f"{name}_ptr": x, f"{name}_batch_stride": x.stride(0), f"{name}_row_stride": x.stride(1)}


def _tiles(x: Tensor) -> tuple[Tile, Tile]:
    """Return the tiles of the forward and the backward kernel."""
    if not x.is_cuda:
        return INTERPRETED
    if x.dtype == torch.float32:
        return FP32
    return {9: HOPPER, 10: BLACKWELL}.get(torch.cuda.get_device_capability(x.device)[0], OTHERS)


def _constants(x: Tensor, tile: Tile) -> dict[str, Any]:
    operand = operand_dtype(x)
    precision = "tf32x3" if operand == tl.float32 else "tf32"
    sizes = {"ROWS": tile.rows, "CHUNK": tile.chunk, "num_warps": tile.warps, "num_stages": tile.stages}
    return {"OPERAND": operand, "PRECISION": precision, **sizes}


def _empty_outputs(x: Tensor, log_poles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (channels, poles), (batch, _, length) = log_poles.shape, x.shape
    tile = _tiles(x)[1]
    carried = -(-length // (tile.rows * tile.chunk))
    return (
        empty_rows(x, channels)[..., :length],
        x.new_empty(batch, channels, poles, dtype=torch.float32),
        x.new_empty(batch, channels, poles, dtype=torch.float32),
        x.new_empty(batch, channels, carried, poles, dtype=torch.float32),
    )


def _empty_gradients(x: Tensor, log_poles: Tensor, taps: Tensor | None, history: Tensor | None) -> dict[str, Tensor]:
    """Return room for all gradients; those of parameters are of each row of the batch, to be summed."""
    (batch, *_), (channels, poles), gated = x.shape, log_poles.shape, taps is not None
    shapes = dict.fromkeys(("log_poles", "residues", "state"), (channels, poles))
    shapes |= {"taps": (channels * gated, 9), "skip": (channels * gated, 1)}
    return {
        "x": empty_rows(x, x.shape[1])[..., : x.shape[2]],
        **{name: x.new_empty(batch, *shape, dtype=torch.float32) for name, shape in shapes.items()},
        "history": x.new_empty((0,) if history is None else history.shape),
    }


def _in_order(grads: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    names = ("x", "log_poles", "residues", "state", "taps", "skip", "history")
    x, log_poles, residues, state, taps, skip, history = (grads[name] for name in names)
    return x, log_poles, residues, state, taps, skip, history


@modal_scan.register_fake
def _(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    taps: Tensor | None = None,
    skip: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, log_poles)


@modal_scan_backward.register_fake
def _(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    lengths: Tensor | None,
    taps: Tensor | None,
    skip: Tensor | None,
    history: Tensor | None,
    slope: Tensor,
    carried: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_gradients(x, log_poles, taps, history)
    over_batch = {"log_poles": log_poles, "residues": residues, "taps": taps, "skip": skip}
    return _in_order(grads | {name: torch.empty_like(like) for name, like in over_batch.items() if like is not None})


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, log_poles, residues, state, lengths, taps, skip, history = inputs
    ctx.save_for_backward(x, log_poles, residues, lengths, taps, skip, history, *output[2:])
    ctx.state = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x, log_poles, _, _, taps, skip, history, *_ = saved
    if grad_y is None:
        grad_y = x.new_zeros(x.shape[0], log_poles.shape[0], x.shape[2])
    grads = modal_scan_backward(*saved, grad_y, grad_final)
    grad_x, grad_log_poles, grad_residues, grad_state, grad_taps, grad_skip, grad_history = grads
    return (
        grad_x,
        grad_log_poles,
        grad_residues,
        None if ctx.state is None else grad_state.to(ctx.state),
        None,
        None if taps is None else grad_taps,
        None if skip is None else grad_skip,
        None if history is None else grad_history.to(history.dtype),
    )


modal_scan.register_autograd(_gradient, setup_context=_keep)
