from __future__ import annotations

import numpy as np
import pytest
from tests.cistron.data.corpora import make_corpus

from cistron.data.config import DataConfig, build_plan
from cistron.data.plan import SamplePlan, permute, worker_block
from cistron.errors import ConfigError, InputError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(size):
    assert sorted(permute(i, size=size, seed=3, epoch=1) for i in range(size)) == list(range(size))


def test_permute_differs_by_seed_and_epoch():
    def order(seed, epoch):
        return [permute(i, size=500, seed=seed, epoch=epoch) for i in range(500)]

    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert order(1, 2) == order(1, 2)


def test_permute_looks_random():
    size, trials = 64, 3000
    landed = np.array([permute(7, size=size, seed=seed, epoch=0) for seed in range(trials)])
    counts = np.bincount(landed, minlength=size)
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert chi_square < 63 + 5 * 11.2
    neighbours = [permute(i, size=1000, seed=0, epoch=0) for i in range(1000)]
    steps = np.abs(np.diff(neighbours))
    assert 250 < steps.mean() < 420  # Uniform: 333.


def test_permute_huge_range_needs_no_memory():
    size = 10**13
    images = {permute(i, size=size, seed=0, epoch=0) for i in range(200)}
    assert len(images) == 200
    assert all(0 <= image < size for image in images)


def test_windows_cover_every_letter_once(tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), size=int(size))) for size in rng.integers(3, 260, size=9)]
    index = make_corpus(tmp_path / "corpus", sequences)
    plan = SamplePlan(index, objective="next_token", max_length=16, seed=5)
    seen = [np.zeros(length, dtype=int) for length in index.lengths]
    for i in range(plan.samples_per_epoch):
        sample = plan.locate(i)
        assert sample.epoch == 0
        assert 2 <= sample.length <= 16
        seen[int(index.row_offsets[sample.shard]) + sample.row][sample.start : sample.start + sample.length] += 1
    for row in seen:
        lone = len(row) % 16 == 1
        assert (row[: len(row) - lone] == 1).all()
        assert not lone or row[-1] == 0


def test_rows_without_a_target_are_left_out(tmp_path):
    index = make_corpus(tmp_path / "corpus", ["A", "AC", "G"])
    plan = SamplePlan(index, objective="next_token", max_length=8, seed=0)
    assert plan.samples_per_epoch == 1
    assert plan.locate(0).row == 1


def test_epochs_visit_everything_in_another_order(tmp_path):
    index = make_corpus(tmp_path / "corpus", ["MKTAYIAKQR" * k for k in range(1, 21)], alphabet="protein")
    plan = SamplePlan(index, objective="masked", max_length=30, seed=1)
    n = plan.samples_per_epoch
    assert n == 20
    epochs = [[plan.locate(e * n + i) for i in range(n)] for e in range(3)]
    visits = [[(s.shard, s.row) for s in epoch] for epoch in epochs]
    assert all(sorted(visit) == sorted(visits[0]) for visit in visits)
    assert visits[0] != visits[1] != visits[2]
    assert [s.epoch for s in epochs[2]] == [2] * n


def test_crops_are_inside_vary_and_repeat(tmp_path):
    index = make_corpus(tmp_path / "corpus", ["M" * 50], alphabet="protein")
    plan = SamplePlan(index, objective="masked", max_length=20, seed=1)
    starts = [plan.locate(i).start for i in range(300)]
    assert min(starts) == 0
    assert max(starts) == 30
    assert len(set(starts)) == 31
    assert starts == [plan.locate(i).start for i in range(300)]
    first = SamplePlan(index, objective="masked", max_length=20, seed=1, crop="start")
    assert {first.locate(i).start for i in range(50)} == {0}
    assert {first.locate(i).length for i in range(50)} == {20}


def test_fingerprint_depends_on_every_setting_and_the_data(tmp_path):
    index = make_corpus(tmp_path / "a", ["ACGT" * 10])
    other = make_corpus(tmp_path / "b", ["ACGA" * 10])
    base = {"objective": "next_token", "max_length": 8, "seed": 0}
    plans = [SamplePlan(index, **base), SamplePlan(other, **base)]
    plans += [SamplePlan(index, **(base | change)) for change in ({"seed": 1}, {"max_length": 9})]
    plans += [SamplePlan(index, **base, lowercase_weight=0.5), SamplePlan(index, **base, keep_ends=True)]
    plans += [SamplePlan(index, **base, replacement="vocabulary"), SamplePlan(index, **base, crop="start")]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert SamplePlan(index, **base).fingerprint == plans[0].fingerprint


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"objective": "masked"}, ConfigError, "holds dna: its objective is 'next_token'"),
        ({"max_length": 101}, ConfigError, "row_length=101"),
        ({"max_length": 1}, ConfigError, "at least 2"),
        ({"seed": -1}, ConfigError, "seed at least 0"),
    ],
)
def test_contradictions_are_refused(tmp_path, change, error, match):
    index = make_corpus(tmp_path / "corpus", ["ACGT" * 10])
    with pytest.raises(error, match=match):
        SamplePlan(index, **({"objective": "next_token", "max_length": 8, "seed": 0} | change))


def test_a_split_without_documents_is_refused(tmp_path):
    index = make_corpus(tmp_path / "corpus", ["A", "C"])
    with pytest.raises(InputError, match="'train' holds no document"):
        SamplePlan(index, objective="next_token", max_length=8, seed=0)


def test_negative_index_is_refused(tmp_path):
    plan = SamplePlan(make_corpus(tmp_path / "c", ["ACGT"]), objective="next_token", max_length=8, seed=0)
    with pytest.raises(InputError, match="-1"):
        plan.locate(-1)


def test_worker_blocks_partition_the_stream():
    for workers in (1, 2, 4):
        blocks = [
            worker_block(b, start=40, rank=r, num_workers=workers, samples_per_block=3)
            for b in range(8 // workers)
            for r in range(workers)
        ]
        assert [i for block in blocks for i in block] == list(range(40, 64))


def test_build_plan_opens_and_verifies(tmp_path):
    make_corpus(tmp_path / "corpus", ["ACGT" * 30])
    config = DataConfig(path=str(tmp_path / "corpus"), max_length=16, seed=3, lowercase_weight=0.5)
    plan = build_plan(config, split="train", objective="next_token")
    assert (plan.max_length, plan.seed, plan.lowercase_weight) == (16, 3, 0.5)
    with pytest.raises(InputError, match=r"no split 'valid' \(has: train\)"):
        build_plan(config, split="valid", objective="next_token")
    shard = tmp_path / "corpus" / "train" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shard-00000\.parquet: .* bytes, but the index says"):
        build_plan(config, split="train", objective="next_token")
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00000\.parquet: no such file"):
        build_plan(config, split="train", objective="next_token")
