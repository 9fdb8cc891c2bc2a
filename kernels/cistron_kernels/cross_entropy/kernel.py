"""Triton kernels over a small vocabulary, all of whose logits of a token are in one tile.

The backward of the cross-entropy reads the logits again, which it must anyway, so nothing else is kept for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cistron_kernels.launch import on_device, operand_dtype, plane, row_tile

_TILES = {True: {"TOKENS": 64, "DEPTH": 32}, False: {"TOKENS": 32, "DEPTH": 16}}
"""Tokens of one program of `score_logprob`, and hidden channels of one step of its product, by whether its operands are
half precisions. With 512 classes beside them, its accumulators fill half the registers; fp32 operands take three times
the room."""


@triton.jit
def _exponentials(logits):
    """Return exp(z - max z), its sum, and log sum exp z, of each row of logits [R, V]."""
    largest = tl.max(logits, axis=1)
    powers = tl.exp(logits - largest[:, None])
    total = tl.sum(powers, axis=1)
    return powers, total, largest + tl.log(total)


@triton.jit
def forward_kernel(
    logits_ptr, targets_ptr, scored_ptr, losses_ptr, rows, columns, stride, ignore_index,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write weight times negative log-likelihood of ROWS positions; NaN for an id outside of the vocabulary."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    logits = tl.load(logits_ptr + row[:, None] * stride + column[None, :], mask=inside, other=float("-inf"))
    logits = tl.where((row < rows)[:, None], logits.to(tl.float32), 0.0)
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    scored = tl.load(scored_ptr + row, mask=row < rows, other=0.0)
    _, _, normaliser = _exponentials(logits)
    at_target = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
    known = (target >= 0) & (target < columns)
    loss = tl.where(known, normaliser - at_target, float("nan"))
    loss = tl.where(target == ignore_index, 0.0, loss)
    tl.store(losses_ptr + row, loss * scored, mask=row < rows)


@triton.jit
def backward_kernel(
    logits_ptr, targets_ptr, scored_ptr, grad_losses_ptr, grad_logits_ptr, rows, columns, stride, grad_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits of ROWS positions."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    logits = tl.load(logits_ptr + row[:, None] * stride + column[None, :], mask=inside, other=float("-inf"))
    logits = tl.where((row < rows)[:, None], logits.to(tl.float32), 0.0)
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    factor = tl.load(scored_ptr + row, mask=row < rows, other=0.0)
    factor *= tl.load(grad_losses_ptr + row * grad_stride, mask=row < rows, other=0.0)
    powers, total, _ = _exponentials(logits)
    grad = powers / total[:, None] - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    grad = (grad * factor[:, None]).to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + row[:, None] * columns + column[None, :], grad, mask=inside)


@triton.jit
def score_kernel(
    hidden_ptr, weight_ptr, targets_ptr, scores_ptr, rows, classes, channels, stride,
    OPERAND: tl.constexpr, TOKENS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the log-probabilities of TOKENS targets: the logits of a token live in the accumulators only."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    column, depth = tl.arange(0, CLASSES), tl.arange(0, DEPTH)
    logits = tl.zeros((TOKENS, CLASSES), dtype=tl.float32)
    for start in range(0, channels, DEPTH):
        channel = start + depth
        at = row[:, None] * stride + channel[None, :]
        hidden = tl.load(hidden_ptr + at, mask=(row < rows)[:, None] & (channel < channels)[None, :], other=0.0)
        at = column[None, :] * channels + channel[:, None]
        weight = tl.load(weight_ptr + at, mask=(column < classes)[None, :] & (channel < channels)[:, None], other=0.0)
        # Three products of tf32 parts are fp32 in all but name; bf16 operands have one exact product.
        logits = tl.dot(hidden.to(OPERAND), weight.to(OPERAND), logits, input_precision="tf32x3")
    logits = tl.where((column < classes)[None, :], logits, float("-inf"))
    _, _, normaliser = _exponentials(logits)
    target = tl.load(targets_ptr + row, mask=row < rows, other=0)
    at_target = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
    known = (target >= 0) & (target < classes)
    tl.store(scores_ptr + row, tl.where(known, at_target - normaliser, float("nan")), mask=row < rows)


@torch.library.custom_op("cistron::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, targets: Tensor, scored: Tensor, ignore_index: int) -> Tensor:
    """Return weight times negative log-likelihood [T] in fp32, for weights `scored` [T] in fp32."""
    logits, targets, scored = plane(logits), targets.contiguous(), scored.contiguous()
    losses = scored.new_empty(scored.shape)
    (rows, columns), tile = logits.shape, row_tile(logits.shape[1], per_thread=16)
    if rows:
        with on_device(logits):
            forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                logits, targets, scored, losses, rows, columns, logits.stride(0), ignore_index, **tile
            )
    return losses


@torch.library.custom_op("cistron::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(logits: Tensor, targets: Tensor, scored: Tensor, grad_losses: Tensor) -> Tensor:
    """Return the gradient of the logits."""
    grad_logits = logits.new_empty(logits.shape)
    logits, targets, scored = plane(logits), targets.contiguous(), scored.contiguous()
    (rows, columns), tile = logits.shape, row_tile(logits.shape[1], per_thread=16)
    if rows:
        with on_device(logits):
            backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                logits, targets, scored, grad_losses, grad_logits, rows, columns, logits.stride(0),
                grad_losses.stride(0), **tile,
            )  # fmt: skip
    return grad_logits


@torch.library.custom_op("cistron::score_logprob", mutates_args=())
def score_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability [T] of each target; arguments are checked by the package's function of this name."""
    hidden, weight, targets = plane(hidden), weight.contiguous(), targets.contiguous()
    scores = hidden.new_empty(len(hidden), dtype=torch.float32)
    classes = max(16, triton.next_power_of_2(len(weight)))
    operand = operand_dtype(hidden) if hidden.dtype == weight.dtype else tl.float32
    tile = _TILES[operand != tl.float32]
    if len(hidden):
        with on_device(hidden):
            score_kernel[(triton.cdiv(len(hidden), tile["TOKENS"]),)](
                hidden, weight, targets, scores, len(hidden), len(weight), hidden.shape[1], hidden.stride(0),
                OPERAND=operand, CLASSES=classes, num_warps=8 if classes > 128 else 4,
                num_stages=1 if classes > 128 else 2, **tile,  # A second stage of wide tiles spills registers.
            )  # fmt: skip
    return scores


@cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, scored: Tensor, ignore_index: int) -> Tensor:
    return scored.new_empty(scored.shape)


@cross_entropy_backward.register_fake
def _(logits: Tensor, targets: Tensor, scored: Tensor, grad_losses: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


@score_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, grad_losses):
    return cross_entropy_backward(*ctx.saved_tensors, grad_losses), None, None, None


cross_entropy.register_autograd(_gradient, setup_context=_keep)
