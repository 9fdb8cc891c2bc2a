"""The plan as a Ray Data stream of uniform blocks, the unit that workers are dealt.

Ray 2.60 has no saved position of a data iterator, so exactly-once training is built from three facts: blocks are
uniform, ``preserve_order`` makes ``streaming_split`` deal them in turn, and the stream can begin at any cursor. The
same global step then holds the same samples on 1, 2 or 4 workers, before and after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import Datasource, ExecutionOptions, ReadTask
from ray.data.block import BlockMetadata

from cistron.data.plan import SamplePlan
from cistron.data.samples import iterate_samples, to_table
from cistron.errors import InputError

_BYTES_PER_TOKEN = 12
"""int32 id and target, float32 weight."""

_TASK_BYTES = 64 << 20
_TASKS_AT_LEAST = 64


class PlannedSource(Datasource):
    """Samples [start, stop) of a plan, `samples_per_block` of them in each block, several blocks in each task."""

    def __init__(self, plan: SamplePlan, *, start: int, stop: int, samples_per_block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # The plan of a large corpus holds hundreds of megabytes of row lengths: one copy per node, not one per task.
        self._plan = ray.put(plan)
        self._block_bytes = samples_per_block * plan.max_tokens * _BYTES_PER_TOKEN
        self._starts = range(start, stop, samples_per_block)
        self._blocks_per_task = _blocks_per_task(len(self._starts), self._block_bytes)

    @property
    def num_tasks(self) -> int:
        """Number of read tasks."""
        return -(-len(self._starts) // self._blocks_per_task)

    def estimate_inmemory_data_size(self) -> int:
        """Return an upper bound of the stream's size in bytes."""
        return len(self._starts) * self._block_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return the tasks in order, as many as there are, whatever parallelism Ray would like."""
        size = self._blocks_per_task
        parts = (self._starts[i : i + size] for i in range(0, len(self._starts), size))
        return [
            ReadTask(
                partial(_read_blocks, self._plan, starts),
                BlockMetadata(len(starts), len(starts) * self._block_bytes, None, None),
                per_task_row_limit=per_task_row_limit,
            )
            for starts in parts
        ]


def training_dataset(plan: SamplePlan, *, start: int, stop: int, samples_per_block: int) -> ray.data.Dataset:
    """Return samples [start, stop) of `plan` as a Ray dataset of uniform blocks, in order.

    Block k is one row that holds the samples from ``start + k * samples_per_block`` on. Consume it with
    ``iter_batches(batch_size=None, batch_format="pyarrow")`` and :func:`cistron.data.samples.from_table`. Under Ray
    Train also pass ``dataset_config=ordered_ingest()``, because Train replaces a dataset's execution options.

    Args:
        plan: the order of the samples.
        start: cursor, the number of samples consumed before.
        stop: end of the run, exclusive. Make ``stop - start`` a multiple of a global step: ``streaming_split`` drops a
            tail that it cannot deal evenly.
        samples_per_block: samples in each block.

    Raises:
        InputError: the range is empty, negative, or no multiple of `samples_per_block`.
    """
    if samples_per_block < 1 or not 0 <= start < stop or (stop - start) % samples_per_block:
        raise InputError(
            f"samples [{start}, {stop}) cannot be cut into blocks of {samples_per_block}: "
            "the range must be positive and a multiple of samples_per_block"
        )
    source = PlannedSource(plan, start=start, stop=stop, samples_per_block=samples_per_block)
    dataset = ray.data.read_datasource(source, override_num_blocks=source.num_tasks)
    dataset.context.execution_options.preserve_order = True
    # Ray merges what one task yields until it exceeds this size: at one byte every row leaves as a block of its own.
    dataset.context.target_max_block_size = 1
    return dataset


def ordered_ingest() -> ray.train.DataConfig:
    """Return the Ray Train data configuration under which ``training_dataset`` keeps its order."""
    return ray.train.DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False)


def _blocks_per_task(num_blocks: int, block_bytes: int) -> int:
    """Return a number that keeps long runs to few tasks, as each costs the scheduler time, and short ones parallel."""
    return max(1, min(_TASK_BYTES // block_bytes, num_blocks // _TASKS_AT_LEAST))


def _read_blocks(plan: ray.ObjectRef[SamplePlan], starts: range) -> Iterator[pa.Table]:
    """Read the blocks that begin at `starts`, on a worker."""
    held = ray.get(plan)
    for start in starts:
        yield to_table(iterate_samples(held, range(start, start + starts.step)))
