"""The part of the scan whose cost grows with length: chunk products and the recurrence between chunks, with gradients.

Shape legend: B batch, H channels, h channels of one block, L length, S poles of a channel, C tokens of a chunk,
n chunks of a row, R = B * n rows of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cistron_kernels.modal_scan.matrices import ScanMatrices

# Elements of `x` that one block of channels holds on CPU: with its states and outputs they fit a last-level cache.
_BLOCK_ELEMENTS = 2**21
_CACHE_LINE = 64


def scan_chunks(
    x: torch.Tensor, matrices: ScanMatrices, initial: torch.Tensor, whole: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the scan, block of channels by block.

    Args:
        x: [B, H, L].
        matrices: for chunks of C tokens.
        initial: [H, B, S], the state before the first chunk.
        whole: [B], chunks after which each row's state is wanted, or one number of at least 1 for all rows.

    Returns:
        y [H, B, n, C] and the wanted states [H, B, S].
    """
    toeplitz, to_state, from_state, _, decays = matrices
    (batch, channels, length), size = x.shape, toeplitz.shape[-1]
    y = _new((channels, batch, -(-length // size), size), toeplitz)
    reached = torch.empty_like(initial)
    states_of = _BlockStates(x, toeplitz, initial)
    for block in _channel_blocks(x):
        rows = _rows(x[:, block], toeplitz)
        before, reached[block] = states_of(rows, to_state[block], decays[:, block], initial[block], whole)
        out = y[block].flatten(1, 2)
        torch.bmm(rows, toeplitz[block], out=out)
        out.baddbmm_(before, from_state[block])
    return y, reached


class ChunkedScan(torch.autograd.Function):
    """The same with gradients; nothing but the inputs is kept for them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, initial: torch.Tensor, whole: torch.Tensor | int, *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the scan; see :func:`scan_chunks`. Autograd sees tensors only, so the matrices come one by one."""
        ctx.save_for_backward(x, initial, *matrices)
        ctx.whole = whole
        return scan_chunks(x, ScanMatrices(*matrices), initial, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_reached: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Transpose every product of `forward` and run the recurrence from the last chunk to the first."""
        x, initial, *matrices = ctx.saved_tensors
        toeplitz, to_state, from_state, log_decay, decays = matrices
        whole = ctx.whole
        grad_x = _new(grad_y.shape, toeplitz)
        others = (initial, toeplitz, to_state, from_state, log_decay)
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in others]
        with torch.autocast(x.device.type, enabled=False):
            states_of = _BlockStates(x, toeplitz, initial)
            for block in _channel_blocks(x):
                rows, grad_rows = _rows(x[:, block], toeplitz), grad_y[block].flatten(1, 2)
                before, _ = states_of(rows, to_state[block], decays[:, block], initial[block], whole)
                direct = torch.bmm(grad_rows, from_state[block].mT).view(len(rows), *grad_y.shape[1:3], -1)
                adjoint = _adjoint(direct, grad_reached[block], whole, decays[:, block])
                after = adjoint[:, :, 1:].flatten(1, 2)
                out = grad_x[block].flatten(1, 2)
                torch.bmm(grad_rows, toeplitz[block].mT, out=out)
                out.baddbmm_(after, to_state[block].mT)
                grad_initial, grad_toeplitz, grad_to_state, grad_from_state, grad_log_decay = (g[block] for g in grads)
                grad_toeplitz.copy_(torch.bmm(rows.mT, grad_rows))
                grad_to_state.copy_(torch.bmm(rows.mT, after))
                grad_from_state.copy_(torch.bmm(before.mT, grad_rows))
                grad_log_decay.copy_((before * after).sum(1) * decays[0, block])
                grad_initial.copy_(adjoint[:, :, 0])
        grad_x = grad_x.flatten(2).transpose(0, 1)[..., : x.shape[-1]].to(x.dtype)
        return grad_x, grads[0], None, *grads[1:], None


class _BlockStates:
    """The states of one block of channels after another, in the same memory: new memory would be zeroed anew."""

    def __init__(self, x: torch.Tensor, toeplitz: torch.Tensor, initial: torch.Tensor) -> None:
        _, batch, poles = initial.shape
        self._shape = batch, -(-x.shape[-1] // toeplitz.shape[-1]), poles
        # One state more than chunks: shifted by that one, the states after all chunks are those before them.
        self._memory = _new((_block_size(x) * math.prod(self._shape[:2]) + 1, poles), toeplitz)

    def __call__(
        self,
        rows: torch.Tensor,
        to_state: torch.Tensor,
        decays: torch.Tensor,
        initial: torch.Tensor,
        whole: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states [h, R, S] before the chunks in rows [h, R, C], which the next call overwrites.

        The second tensor [h, B, S] has the states after `whole` chunks.
        """
        count = len(rows) * rows.shape[1]
        after = self._memory[1 : count + 1].view(len(rows), *self._shape)
        torch.bmm(rows, to_state, out=after.flatten(1, 2))
        after[:, :, 0].addcmul_(decays[0][:, None], initial)
        accumulate(after, decays)
        if isinstance(whole, torch.Tensor):
            reached = torch.where(whole[:, None] > 0, after[_chunk_of_rows((whole - 1).clamp(min=0))], initial)
        else:
            reached = after[_chunk_of_rows(whole - 1)].clone()
        before = self._memory[:count].view(len(rows), *self._shape)
        before[:, :, 0] = initial
        return before.flatten(1, 2), reached


def _channel_blocks(x: torch.Tensor) -> Iterator[slice]:
    """Yield the channels of x [B, H, L] in blocks; all at once where kernel launches cost more than cache misses."""
    channels, step = x.shape[1], _block_size(x)
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _block_size(x: torch.Tensor) -> int:
    batch, channels, length = x.shape
    return min(channels, max(1, _BLOCK_ELEMENTS // (batch * length))) if x.device.type == "cpu" else channels


def _new(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor of the dtype and device of `like`.

    On CPU its memory comes from NumPy, which asks the system for huge pages. In torch's, the system zeroes small page
    after small page as the products first touch them: half as long again as the products themselves at 64k tokens.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    memory = np.empty(size + _CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE  # The 16 states of a chunk in fp32 are one cache line, not parts of two.
    return torch.from_numpy(memory[start : start + size]).view(like.dtype).view(shape)


def _rows(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cut x [B, h, L] into zero-padded rows [h, R, C] of the size and dtype of `like`; a view where nothing changes."""
    size = like.shape[-1]
    x = x.transpose(0, 1).to(like.dtype)
    if missing := -x.shape[-1] % size:
        x = functional.pad(x, (0, missing))
    return x.reshape(len(x), -1, size)


def _chunk_of_rows(chunks: torch.Tensor | int) -> tuple[slice, torch.Tensor | slice, torch.Tensor | int]:
    """Return the index that takes from [h, B, n, S] one chunk of each row, `chunks` [B] or the same one of all."""
    all_rows = slice(None)
    if isinstance(chunks, torch.Tensor):
        return all_rows, torch.arange(len(chunks), device=chunks.device), chunks
    return all_rows, all_rows, chunks


def _adjoint(
    direct: torch.Tensor, grad_reached: torch.Tensor, whole: torch.Tensor | int, decays: torch.Tensor
) -> torch.Tensor:
    """Return the gradients [h, B, n+1, S] of all states from those through the outputs [h, B, n, S] and `reached`."""
    direct = functional.pad(direct, (0, 0, 0, 1))
    direct[_chunk_of_rows(whole)] += grad_reached
    backwards = direct.flip(2)
    accumulate(backwards, decays)
    return backwards.flip(2)


def accumulate(updates: torch.Tensor, decays: torch.Tensor) -> None:
    """Add to every update [h, B, n, S] the decayed ones before it, in place: ``u[i] += decays[0] * u[i - 1]``.

    Each update meets log2(n) of the decays [K, h, S] of 1, 2, 4, ... steps, rounded once each; n steps in turn would
    repeat the rounding of one power n times, which a pole that survives thousands of chunks shows in fp32.
    """
    _accumulate_by_pairs(updates, decays[..., None, None, :].unbind())


def _accumulate_by_pairs(updates: torch.Tensor, decays: tuple[torch.Tensor, ...]) -> None:
    """Do so for every other one by the recurrence over pairs of steps, and for the rest by one step from those."""
    steps = updates.shape[2]
    if steps > 1:
        pairs = updates[:, :, 1::2]
        pairs.addcmul_(decays[0], updates[:, :, : steps - 1 : 2])
        _accumulate_by_pairs(pairs, decays[1:])
        updates[:, :, 2::2].addcmul_(decays[0], updates[:, :, 1 : steps - 1 : 2])
