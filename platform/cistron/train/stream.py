"""From Ray Data to the loop: whole blocks in, packed micro-batches of one step out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from cistron.data.pack import PackedBatch, pack
from cistron.data.plan import SamplePlan, worker_block
from cistron.data.samples import from_table, held_out_samples
from cistron.errors import CistronError
from cistron.parallel.mesh import World
from cistron.train.config import TrainConfig


def training_steps(
    blocks: Iterable[pa.Table], config: TrainConfig, *, world: World, cursor: int
) -> Iterator[list[PackedBatch]]:
    """Yield this rank's micro-batches, one list for each step.

    Args:
        blocks: this rank's share of the stream that began at `cursor`.
        config: sizes of blocks, steps and micro-batches.
        world: this process among its peers.
        cursor: samples consumed before.

    Raises:
        CistronError: a block holds other samples than the plan says; "exactly once" would be broken.
    """
    counted = enumerate(blocks)
    while step := list(islice(counted, config.blocks_per_worker)):
        batches = []
        for block, table in step:
            samples = from_table(table)
            expected = worker_block(
                block,
                start=cursor,
                rank=world.rank,
                num_workers=world.size,
                samples_per_block=config.samples_per_block,
            )
            got = [sample.sample_index for sample in samples]
            if got != list(expected):
                raise CistronError(
                    f"rank {world.rank}: block {block} after cursor {cursor} holds samples {got[:3]}.. ({len(got)}), "
                    f"expected {expected.start}..{expected.stop - 1}"
                )
            batches += pack(samples, token_budget=config.token_budget)
        yield batches


def evaluation_blocks(plan: SamplePlan, config: TrainConfig, *, world: World) -> dict[int, list[PackedBatch]]:
    """Return this rank's share of the first ``evaluate_samples`` held-out samples, packed block by block.

    The same blocks exist whatever the number of ranks; only who scores them differs.
    """
    total = min(config.evaluate_samples, plan.samples_per_epoch)
    starts = range(0, total, config.samples_per_block)
    return {
        block: pack(
            held_out_samples(plan, range(start, min(start + config.samples_per_block, total))),
            token_budget=config.token_budget,
        )
        for block, start in enumerate(starts)
        if block % world.size == world.rank
    }
