"""Parts on Ray Data: one task reads them, each a block of its own, and a pool of actors computes and writes them.

A part whose actor dies is given to another one. Ray keeps the order of nothing here and need not: a part is a file
with a number.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from cistron.data.prepare import without_ray_log
from cistron.errors import CapabilityError, own_error
from cistron_jobs.bulk.worker import PartReport, PartWorker

logger = logging.getLogger(__name__)

Parts: TypeAlias = Callable[[], Iterator[pa.Table]]
"""The records of a job, one table per part: the same tables in the same order at every call."""

_ATTEMPTS: Final = 4
"""How often a part may be begun. Ray tries for ever, also with one that kills every actor, for want of memory say."""

_READER_CPUS: Final = 0.5
"""The reader mostly waits for the actors."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and what each of them holds."""

    actors: int
    cpus: int
    threads: int
    gpus: int


class PartSource(Datasource):
    """The parts of a job without those in `skip`; one task reads them all, because a compressed file has no middle."""

    def __init__(self, parts: Parts, skip: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = partial(_read, parts, skip, Path.cwd())

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: it is not known before the input has been read."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return the one task, whatever parallelism Ray would like."""
        return [ReadTask(self._read, BlockMetadata(None, None, None, None))]


class PartActor:
    """A worker as Ray Data calls it: a block in, a block out."""

    def __init__(self, worker: PartWorker, threads: int, folder: Path) -> None:
        _enter(folder)
        torch.set_num_threads(threads)
        self._folder = worker.folder
        self._compute = worker.open()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Compute the part in `block`; return its report.

        Raises:
            CapabilityError: the part has killed its actor again and again.
        """
        [row] = block.to_pylist()
        number = row["number"]
        if self._folder.begin(number) > _ATTEMPTS:
            raise CapabilityError(
                f"part {number} has killed its actor {_ATTEMPTS} times, perhaps for want of memory: lower token_budget "
                "or letters_per_part"
            )
        report = self._compute(number, pa.ipc.open_stream(row["records"]).read_all())
        return pa.Table.from_pylist([asdict(report)])


def compute_on_ray(worker: PartWorker, parts: Parts, *, skip: frozenset[int], pool: Pool) -> Iterator[PartReport]:
    """Compute the parts that are not in `skip`; yield a report as each is finished.

    Raises:
        CistronError: what the job refuses.
        CapabilityError: a part has killed its actor again and again.
    """
    # With other resources than the actors' the reader stays apart; equal ones would fuse it into a single actor.
    dataset = ray.data.read_datasource(PartSource(parts, skip), override_num_blocks=1, num_cpus=_READER_CPUS)
    # Ray merges what one task yields until it exceeds this size: at one byte every part is a block of its own.
    dataset.context.target_max_block_size = 1
    dataset.context.raise_original_map_exception = True
    # A part of one very long sequence takes what it takes, and so does a cluster to find GPUs.
    dataset.context.execution_no_progress_timeout_s = -1
    dataset = dataset.map_batches(
        PartActor,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # A part that waits for a busy actor could have run on an idle one.
        compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(worker, pool.threads, Path.cwd()),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    try:
        with without_ray_log():
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from (PartReport(**row) for row in batch.to_pylist())
    except Exception as error:
        raise own_error(error) from error


def _read(parts: Parts, skip: frozenset[int], folder: Path) -> Iterator[pa.Table]:
    """Read the parts, on a worker. A part is one row, because Ray cuts blocks of several."""
    _enter(folder)
    for number, records in enumerate(parts()):
        if number not in skip:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, records.schema) as stream:
                stream.write_table(records)
            payload = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
            yield pa.table({"number": pa.array([number], pa.int64()), "records": payload})


def _enter(folder: Path) -> None:
    """Make relative paths mean what they mean in the program; elsewhere on a cluster the folder may not exist."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


def plan_pool(actors: int | None, *, cpus: int | None, parts: int, device: str) -> Pool:
    """Return the pool for `parts` parts on the cluster that this program is connected to.

    Args:
        actors: how many; None means one per GPU of the cluster, or 1.
        cpus: cores of each; None shares this machine's among them.
        parts: how many there are to compute.
        device: the job's setting.
    """
    found: dict[str, Any] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(found.get("GPU", 0))
    uses_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    actors = min(actors if actors is not None else max(gpus if uses_gpu else 1, 1), parts)
    pool = Pool(actors, cpus or 1, cpus or max(1, torch.get_num_threads() // actors), int(uses_gpu))
    needed = {"CPU": actors * pool.cpus + 1, "GPU": actors * pool.gpus}
    for kind, number in needed.items():
        if number > found.get(kind, 0):
            logger.warning(
                "%d actors and a reader want %d %ss, and the cluster has %d now: some wait until there are more",
                *(actors, number, kind, found.get(kind, 0)),
            )
    return pool
