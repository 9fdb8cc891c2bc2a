"""The loop of one worker. No Ray here: what comes in is a stream of packed batches, what goes out goes to callbacks.

A step's loss is the weighted mean over all its targets on all ranks. Ranks agree on the sum of weights before the first
backward pass, and on the number of micro-batches: one with fewer fills up with empty ones, because forward and backward
passes of sharded models talk to each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from cistron.data.pack import PackedBatch
from cistron.errors import CistronError, InputError
from cistron.models.base import SequenceModel
from cistron.parallel.mesh import World
from cistron.parallel.strategy import Strategy
from cistron.train.callbacks.callback import Callback, Run
from cistron.train.metrics import Meter, StepResult
from cistron.train.optim import learning_rate


def train(
    run: Run,
    stream: Iterator[list[PackedBatch]],
    *,
    flops: Callable[[Sequence[PackedBatch]], float],
    meter: Meter,
    callbacks: Sequence[Callback],
    evaluate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train from ``run.step`` to the configured number of steps.

    Args:
        run: where the run stands; moved on in place.
        stream: this rank's micro-batches of each step, from ``run.cursor`` on.
        flops: counts a forward pass.
        meter: averages the steps between two records.
        callbacks: told of every moment, in order.
        evaluate: returns named held-out losses; called on every rank every ``evaluate_every`` steps and at the end.

    Raises:
        CistronError: the stream ended early, a step has no target at all, or the loss is no longer finite.
    """
    config = run.config.train
    for callback in callbacks:
        callback.on_start(run)
    while run.step < config.steps:
        result = _next_step(run, stream, flops)
        run.step += 1
        run.cursor += config.global_batch_size
        run.tokens += result.tokens
        meter.add(result)
        if _record_is_due(run):
            metrics = meter.flush(step=run.step, tokens=run.tokens)
            for callback in callbacks:
                callback.on_metrics(run, metrics)
        if evaluate is not None and _evaluation_is_due(run):
            values = evaluate()
            for callback in callbacks:
                callback.on_evaluation(run, values)
        for callback in callbacks:
            callback.on_step(run)
    for callback in callbacks:
        callback.on_end(run)


def train_step(
    strategy: Strategy,
    batches: Sequence[PackedBatch],
    *,
    learning_rate: float,
    flops: Callable[[Sequence[PackedBatch]], float],
    wait_s: float = 0.0,
) -> StepResult:
    """Take one optimiser step on all ranks' `batches`.

    Raises:
        CistronError: no rank has a target.
    """
    world = strategy.world
    weight, tokens, operations = world.all_sum(
        [_weight(batches), sum(batch.num_tokens for batch in batches), flops(batches)]
    )
    if weight <= 0:
        raise CistronError("a global step without a single target: raise global_batch_size or max_length")
    aligned = [batch.to(world.device) for batch in align(batches, world)]
    losses = [strategy.accumulate(batch, scale=1.0 / weight, last=batch is aligned[-1]) for batch in aligned]
    norm = strategy.step(learning_rate)
    return StepResult(
        loss_sum=torch.stack(losses).sum(),
        weight=weight,
        tokens=int(tokens),
        flops=operations,
        grad_norm=norm,
        learning_rate=learning_rate,
        wait_s=wait_s,
    )


def evaluate_blocks(strategy: Strategy, blocks: Mapping[int, Sequence[PackedBatch]]) -> float:
    """Return the weighted mean loss over the blocks of all ranks, without gradients.

    Each block's sum is computed by itself and all sums are added exactly, so the result depends neither on the number
    of ranks nor on who scored what.

    Args:
        strategy: holds the model.
        blocks: this rank's packed batches by block number; every block belongs to one rank.

    Raises:
        InputError: no block of any rank has a target.
    """
    world = strategy.world
    own = [(block, batch) for block, batches in blocks.items() for batch in batches]
    aligned = align([batch for _, batch in own], world)
    losses = [float(strategy.evaluate(batch.to(world.device))) for batch in aligned][: len(own)]
    gathered = [
        pair for rank in world.gather(list(zip(losses, (_weight([b]) for _, b in own), strict=True))) for pair in rank
    ]
    weight = math.fsum(weight for _, weight in gathered)
    if weight <= 0:
        raise InputError("the held-out samples hold no target that weighs anything: raise train.evaluate_samples")
    return math.fsum(loss for loss, _ in gathered) / weight


def align(batches: Sequence[PackedBatch], world: World) -> list[PackedBatch]:
    """Return `batches`, filled up with empty ones to the largest number on any rank."""
    (most,) = world.all_max([len(batches)])
    return [*batches, *(_empty_batch() for _ in range(int(most) - len(batches)))]


def forward_flops(model: SequenceModel, batches: Sequence[PackedBatch]) -> float:
    """Return the floating-point operations of a forward pass over all documents of `batches`."""
    lengths = (
        torch.cat([batch.cu_seqlens.diff() for batch in batches]) if batches else torch.empty(0, dtype=torch.int32)
    )
    unique, counts = torch.unique(lengths, return_counts=True)
    pairs = zip(unique.tolist(), counts.tolist(), strict=True)
    return sum(count * length * model.flops_per_token(length) for length, count in pairs)


def _next_step(
    run: Run, stream: Iterator[list[PackedBatch]], flops: Callable[[Sequence[PackedBatch]], float]
) -> StepResult:
    began = time.perf_counter()
    batches = next(stream, None)
    if batches is None:
        raise CistronError(f"the data stream ended at step {run.step} of {run.config.train.steps}")
    return train_step(
        run.strategy,
        batches,
        learning_rate=learning_rate(run.config.train, run.step + 1),
        flops=flops,
        wait_s=time.perf_counter() - began,
    )


def _record_is_due(run: Run) -> bool:
    """Return whether to write a record; one ends at each checkpoint, so that a resumed run averages the same steps."""
    config = run.config.train
    return run.step == config.steps or 0 in (run.step % config.log_every, run.step % config.checkpoint_every)


def _evaluation_is_due(run: Run) -> bool:
    every = run.config.train.evaluate_every
    return every is not None and (run.step % every == 0 or run.step == run.config.train.steps)


def _weight(batches: Sequence[PackedBatch]) -> float:
    """Return the sum of the weights of all targets."""
    return math.fsum(batch.weights[batch.targets >= 0].double().sum().item() for batch in batches)


def _empty_batch() -> PackedBatch:
    """Return two tokens that weigh nothing; their targets are real, so that the loss still hangs on every weight."""
    zeros = torch.zeros(2, dtype=torch.int64)
    return PackedBatch(
        input_ids=zeros,
        targets=zeros,
        weights=torch.zeros(2),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        sample_index=torch.empty(0, dtype=torch.int64),
    )
