"""The section of training: optimiser steps of whole models with random weights, as a run on one GPU takes them.

Weights, gradients and AdamW's states are fp32, products run in bf16 by autocast, gradients of several packed
micro-batches are added and clipped: what `cistron pretrain` does. The largest micro-batch that fits into memory counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import nn

from benchmarks.gpu.batches import Batch, dna, proteins
from benchmarks.gpu.budget import Share
from benchmarks.gpu.cases import run_by
from benchmarks.gpu.context import Context
from benchmarks.gpu.flops import esm2_flops, evo2_flops
from benchmarks.gpu.plan import Training
from benchmarks.gpu.profile import kernel_shares
from benchmarks.gpu.random_models import random_esm2, random_evo2
from benchmarks.gpu.report import Row
from cistron.models.base import SequenceModel
from cistron.models.esm2.model import Esm2
from cistron.models.evo2.model import Evo2
from cistron.parallel.module import LossModule, recompute_blocks
from cistron.train.config import OptimizerConfig
from cistron.train.metrics import PEAK_BF16_FLOPS
from cistron.train.optim import build_optimizer
from cistron_kernels.dispatch import Backend, override

SAME_LOSS: Final = 1e-2
"""Largest relative difference between the losses with and without kernels."""
_CHECKED_TOKENS: Final = 2_048


def run(context: Context, share: Share) -> Iterator[Row]:
    """Yield one row per model, and one for Evo 2 without kernels."""
    for training in context.plan.trainings:
        if problem := context.withheld(*run_by("evo2" if _is_evo2(training) else "esm2", "training")):
            yield Row("training", training.name, problem=problem)
            continue
        if share.spent:
            yield Row("training", training.name, problem=share.reason())
            continue
        try:
            yield from _trained(context, training, share)
        except Exception as error:
            yield Row("training", training.name, problem=f"{type(error).__name__}: {error}"[:500])
        context.free()


def _is_evo2(training: Training) -> bool:
    return training.model.startswith("evo2")


def _trained(context: Context, training: Training, share: Share) -> Iterator[Row]:
    device = context.plan.device
    build = random_evo2 if _is_evo2(training) else random_esm2
    model = build(training.model, device=device, dtype=torch.float32, **context.plan.changes.get(training.model, {}))
    loss = LossModule(model, "bf16")
    if problem := _losses_differ(context, loss, training):
        yield Row("training", training.name, problem=f"not timed: {problem}")
        return
    optimizer = build_optimizer(model, OptimizerConfig())
    yield _largest(context, training, loss, optimizer, "triton")
    if isinstance(model, Evo2) and not share.spent:
        alone = training.attempts[-2 if len(training.attempts) > 1 else -1][0]
        single = Training("the same in plain PyTorch", training.model, ((alone, False),), alone, None, "")
        yield _largest(context, single, loss, optimizer, "torch")


def _losses_differ(context: Context, loss: LossModule, training: Training) -> str:
    tokens = min(_CHECKED_TOKENS, training.step_tokens)
    batch = _batches(context, loss.model, tokens, tokens)[0]
    values = {}
    for backend in ("triton", "torch"):
        with torch.no_grad(), override(backend):
            values[backend] = float(loss(**batch))
    difference = abs(values["triton"] / values["torch"] - 1)
    return "" if difference <= SAME_LOSS else f"the loss differs from plain PyTorch's by {difference:.1e}"


def _largest(
    context: Context, training: Training, loss: LossModule, optimizer: torch.optim.Optimizer, backend: Backend
) -> Row:
    """Return the row of the first attempt that fits into memory."""
    for tokens, recompute in training.attempts:
        batches = _batches(context, loss.model, tokens, training.step_tokens)
        if recompute:
            recompute_blocks(loss.model)
        try:
            with override(backend):
                return _measured(context, training, loss.model, batches, partial(_step, loss, optimizer, batches))
        except torch.OutOfMemoryError:
            pass
        # Only now is the exception gone, whose traceback holds the activations.
        optimizer.zero_grad(set_to_none=True)
        context.free()
    return Row("training", training.name, problem="out of memory at every size")


def _measured(
    context: Context,
    training: Training,
    model: SequenceModel,
    batches: Sequence[Batch],
    step: Callable[[], float],
) -> Row:
    """Return the row of a few steps after one that compiles and makes the optimiser's states."""
    if context.plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = [step()]
    seconds = []
    for _ in range(context.plan.training_steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    if not all(map(_finite, losses)):
        return Row("training", training.name, problem=f"the loss is not finite: {losses}")
    tokens = sum(len(batch["input_ids"]) for batch in batches)
    speed = tokens / statistics.median(seconds)
    forward, backward = _flops(model, batches)
    reached = speed * (forward + backward)
    peak = _peak(context.plan.device)
    recomputed = ", recomputed" if isinstance(model.blocks[0].forward, partial) else ""
    return Row(
        "training",
        training.name,
        f"{len(batches)} x {len(batches[0]['input_ids']):,} tokens{recomputed}",
        shown=f"{speed:,.0f} tokens/s, MFU {100 * reached / peak:.1f} %" if peak else f"{speed:,.0f} tokens/s",
        share=f"{reached / context.ceilings.gemm_flops:.2f}",
        beside=f"published {training.published}" if training.published else "",
        asked=f"{training.asked:,.0f}" if training.asked else "",
        met=speed >= training.asked if training.asked else None,
        figures={
            "tokens_per_s": speed,
            "step_s": seconds,
            "mfu": reached / peak if peak else None,
            "flops_per_token": [forward, backward],
            "losses_per_token": [loss / tokens for loss in losses],
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if context.plan.device.type == "cuda" else None,
            "kernels": kernel_shares(step, context.plan.device),
        },
    )


def _step(loss: LossModule, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> float:
    """Take an optimiser step and return the sum of the losses, which waits for the device."""
    weight = float(sum(batch["weights"].sum() for batch in batches))
    total = torch.zeros((), device=loss.model.device)
    for batch in batches:
        found = loss(**batch)
        (found / weight).backward()
        total += found.detach()
    nn.utils.clip_grad_norm_(loss.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def _batches(context: Context, model: SequenceModel, tokens: int, step_tokens: int) -> list[Batch]:
    make = partial(dna, context.plan.document) if isinstance(model, Evo2) else proteins
    return [make(context.plan.device, tokens, seed) for seed in range(max(1, step_tokens // tokens))]


def _flops(model: SequenceModel, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return forward and backward FLOPs of the average token."""
    lengths = torch.cat([batch["cu_seqlens"].diff() for batch in batches]).double()
    seen = float((lengths**2).sum() / lengths.sum())
    if isinstance(model, Evo2):
        return evo2_flops(model.config, round(seen))
    assert isinstance(model, Esm2)
    return esm2_flops(model.config, seen)


def _peak(device: torch.device) -> float | None:
    """Return the data sheet's FLOP/s of a known GPU, the denominator of MFU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
