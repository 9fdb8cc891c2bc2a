"""Run a job over many records so that a kill costs minutes and never a row.

The input is read once before anything starts, so that a bad record is named at once and not after hours, and cut into
numbered parts. Finished parts lie as files beside the output until all are there and become the one output. The same
command after a kill computes what is missing: neither how the run was cut short nor how many actors there were, each
with as many cores, shows in the result.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import ray
import torch

from cistron.errors import InputError
from cistron.io import storage
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.fingerprint import Fingerprint, fingerprint
from cistron_jobs.bulk.folder import PartsFolder
from cistron_jobs.bulk.output import fingerprint_of, write_parquet
from cistron_jobs.bulk.pool import Parts, compute_on_ray, plan_pool
from cistron_jobs.bulk.progress import ProgressView
from cistron_jobs.bulk.worker import Compute, PartReport, PartWorker
from cistron_jobs.model_config import checked_device
from cistron_jobs.ray_session import ray_session

logger = logging.getLogger(__name__)

Write: TypeAlias = Callable[[str, Iterator[pa.Table], Fingerprint], None]


@dataclass(frozen=True, slots=True)
class BulkJob:
    """What one job computes.

    Attributes:
        name: of the job.
        output: file to make.
        inputs: names of the settings that are paths of input files.
        extra_outputs: names of the settings that are paths of files made from the output afterwards.
        parts: the records, one table per part; picklable. It raises the error of a record that cannot be used.
        compute: from the model and a part's records to its rows, of one schema for all parts; picklable.
        write: makes the file of a path from the rows of all parts, in order.
    """

    name: str
    output: str
    inputs: Sequence[str]
    parts: Parts
    compute: Compute
    write: Write = write_parquet
    extra_outputs: Sequence[str] = ()


def run_bulk(config: BulkConfig, job: BulkJob) -> None:
    """Make the output of a job, going on where an interrupted run of the same job stopped.

    A Parquet output that this very job has made before is left as it is; any other file in its place is replaced when
    the new one is complete.

    Raises:
        CistronError: an input that cannot be used; finished parts of a run with other settings.
    """
    if storage.is_directory(job.output):
        raise InputError(f"output: {job.output} is a folder; name a file in it")
    run = fingerprint(job.name, config, job.inputs, without=job.extra_outputs)
    if not config.restart and fingerprint_of(job.output) == run:
        logger.info("%s: %s is complete already; restart=true computes it anew", job.name, job.output)
        return
    folder = PartsFolder(storage.absolute(job.output))
    finished = folder.claim(run, restart=config.restart)
    with _resumable(folder):
        sizes = [records.num_rows for records in job.parts()]
        if not sizes:
            raise InputError(f"{job.name}: the input holds no records")
        _compute(config, job, folder, sizes, finished)
        _join(job, folder, len(sizes), run)
    folder.remove()


def _compute(
    config: BulkConfig, job: BulkJob, folder: PartsFolder, sizes: Sequence[int], finished: frozenset[int]
) -> None:
    """Compute the parts that are not finished, of which part i has `sizes[i]` records, and show how it goes."""
    if finished:
        logger.info("%s: %d of %d parts were finished before", job.name, len(finished), len(sizes))
    if len(finished) == len(sizes):
        return
    done = sum(size for number, size in enumerate(sizes) if number in finished)
    with _reports(config, job, folder, finished, len(sizes)) as (reports, actors):
        with ProgressView(job.name, total=sum(sizes), done=done) as view:
            for report in reports:
                view.add(report)
        logger.info("%s", view.summary(actors=actors))


@contextmanager
def _reports(
    config: BulkConfig, job: BulkJob, folder: PartsFolder, finished: frozenset[int], count: int
) -> Iterator[tuple[Iterator[PartReport], int]]:
    """Yield the reports of the parts as they are finished, and the number of actors that compute them."""
    if not _wants_ray(config):
        worker = PartWorker(config, checked_device(config.device), job.compute, folder)
        yield _compute_here(worker, job.parts, finished), 0
        return
    if "RAY_ADDRESS" not in os.environ:
        checked_device(config.device)  # What this machine lacks would be waited for: a cluster of our own never grows.
    with ray_session(_logical_cpus(config)):
        pool = plan_pool(config.actors, cpus=config.cpus_per_actor, parts=count - len(finished), device=config.device)
        device = ("cuda" if pool.gpus else "cpu") if config.device == "auto" else config.device
        worker = PartWorker(config, device, job.compute, folder)
        yield compute_on_ray(worker, job.parts, skip=finished, pool=pool), pool.actors


def _wants_ray(config: BulkConfig) -> bool:
    if config.actors is not None:
        return config.actors > 0
    on_cluster = "RAY_ADDRESS" in os.environ or ray.is_initialized()
    return ":" not in config.device and (on_cluster or (config.device != "cpu" and torch.cuda.device_count() > 1))


def _logical_cpus(config: BulkConfig) -> int:
    """Return the CPUs of a cluster of our own: those of the actors, and one for the reader."""
    actors = config.actors or torch.cuda.device_count() or 1
    return actors * (config.cpus_per_actor or 1) + 1


def _compute_here(worker: PartWorker, parts: Parts, finished: frozenset[int]) -> Iterator[PartReport]:
    compute = worker.open()
    for number, records in enumerate(parts()):
        if number not in finished:
            yield compute(number, records)


def _join(job: BulkJob, folder: PartsFolder, count: int, run: Fingerprint) -> None:
    """Make the output from all parts."""
    tables = folder.tables(count)
    if not storage.is_local(job.output):
        job.write(job.output, tables, run)
        return
    # Written inside the folder, so that a kill here leaves nothing elsewhere.
    joined = storage.join(folder.path, f"joined-{storage.name_of(job.output)}")
    job.write(joined, tables, run)
    storage.move(joined, job.output)


@contextmanager
def _resumable(folder: PartsFolder) -> Iterator[None]:
    """Keep the finished parts of a run that fails, and nothing of one that has none."""
    try:
        yield
    except BaseException:
        if finished := len(folder.finished()):
            logger.info("%d finished parts stay in %s: the same command goes on from there", finished, folder.path)
        else:
            folder.remove()
        raise
