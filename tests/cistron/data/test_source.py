from __future__ import annotations

import logging

import numpy as np
import pytest
import ray
import ray.data
from ray.data.context import DataContext
from tests.cistron.data.corpora import make_corpus

from cistron.data import source
from cistron.data.plan import SamplePlan, worker_block
from cistron.data.samples import from_table, iterate_samples
from cistron.data.source import PlannedSource, ordered_ingest, training_dataset
from cistron.errors import InputError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=int(n))) for n in rng.integers(5, 60, size=23)]
    index = make_corpus(tmp_path_factory.mktemp("source") / "corpus", sequences, alphabet="protein")
    return SamplePlan(index, objective="masked", max_length=30, seed=4)


def test_long_runs_put_many_blocks_into_a_task(cluster, plan, monkeypatch):
    monkeypatch.setattr(source, "_TASKS_AT_LEAST", 3)
    planned = PlannedSource(plan, start=0, stop=66, samples_per_block=3)
    assert planned.num_tasks == 4  # Of 7, 7, 7 and 1 blocks.
    dataset = training_dataset(plan, start=0, stop=66, samples_per_block=3)
    assert [numbers(block) for block in blocks(dataset)] == [list(range(first, first + 3)) for first in range(0, 66, 3)]
    splits = deal(training_dataset(plan, start=0, stop=66, samples_per_block=3), 2)
    seen = ray.get([consume.remote(split, 0.02 * rank) for rank, split in enumerate(splits)])
    for rank in range(2):
        assert seen[rank] == [
            list(worker_block(block, start=0, rank=rank, num_workers=2, samples_per_block=3)) for block in range(11)
        ]
    assert len(planned.get_read_tasks(1)) == 4


def test_a_task_stays_small(cluster, plan, monkeypatch):
    monkeypatch.setattr(source, "_TASK_BYTES", 5 * 3 * plan.max_tokens * 12)
    assert PlannedSource(plan, start=0, stop=3 * 6400, samples_per_block=3).num_tasks == 1280


def blocks(iterator):
    return [from_table(table) for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow")]


def numbers(block):
    return [sample.sample_index for sample in block]


@pytest.mark.parametrize("start", [0, 12, 45])
def test_blocks_are_uniform_ordered_and_the_plan_s(cluster, plan, start):
    dataset = training_dataset(plan, start=start, stop=start + 20, samples_per_block=4)
    got = blocks(dataset)
    assert [numbers(block) for block in got] == [list(range(first, first + 4)) for first in range(start, start + 20, 4)]
    expected = iterate_samples(plan, range(start, start + 20))
    for sample, direct in zip((sample for block in got for sample in block), expected, strict=True):
        for name in ("input_ids", "targets", "weights"):
            assert np.array_equal(getattr(sample, name), getattr(direct, name))


def test_the_context_of_others_is_left_alone(cluster, plan):
    training_dataset(plan, start=0, stop=4, samples_per_block=4)
    assert not DataContext.get_current().execution_options.preserve_order


def deal(dataset, num_workers):
    """Split as Ray Train does."""
    shards = ordered_ingest().configure({"train": dataset}, num_workers, None, None)
    return [shard["train"] for shard in shards]


@ray.remote(num_cpus=0)
def consume(iterator, delay_s):
    import time

    seen = []
    for table in iterator.iter_batches(batch_size=None, batch_format="pyarrow"):
        time.sleep(delay_s)
        seen.append([sample.sample_index for sample in from_table(table)])
    return seen


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_are_dealt_blocks_in_turn_whatever_their_speed(cluster, plan, num_workers):
    dataset = training_dataset(plan, start=6, stop=6 + 3 * 16, samples_per_block=3)
    splits = deal(dataset, num_workers)
    seen = ray.get([consume.remote(split, 0.03 * rank) for rank, split in enumerate(splits)])
    for rank in range(num_workers):
        expected = [
            list(worker_block(block, start=6, rank=rank, num_workers=num_workers, samples_per_block=3))
            for block in range(16 // num_workers)
        ]
        assert seen[rank] == expected


@pytest.mark.parametrize(("start", "stop", "size"), [(4, 4, 2), (8, 4, 2), (0, 5, 2), (-2, 2, 2), (0, 4, 0)])
def test_ranges_that_cannot_be_cut(plan, start, stop, size):
    with pytest.raises(InputError, match=rf"samples \[{start}, {stop}\) cannot be cut into blocks of {size}"):
        training_dataset(plan, start=start, stop=stop, samples_per_block=size)
