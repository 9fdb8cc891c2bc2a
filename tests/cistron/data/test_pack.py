from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.cistron.data.corpora import make_corpus

from cistron.data.mask import IGNORED
from cistron.data.pack import pack
from cistron.data.plan import SamplePlan
from cistron.data.samples import TrainingSample, iterate_samples
from cistron.errors import InputError


def sample(number, length):
    ids = np.arange(length, dtype=np.int32) + 100 * number
    return TrainingSample(number, ids, ids + 1, np.full(length, number + 1, dtype=np.float32))


def test_first_fit_in_order_of_arrival():
    batches = pack([sample(i, n) for i, n in enumerate([6, 5, 3, 4, 1, 2])], token_budget=10)
    assert [batch.sample_index.tolist() for batch in batches] == [[0, 2, 4], [1, 3], [5]]
    assert [batch.cu_seqlens.tolist() for batch in batches] == [[0, 6, 9, 10], [0, 5, 9], [0, 2]]


def test_contents_dtypes_and_budget():
    rng = np.random.default_rng(0)
    samples = [sample(i, int(n)) for i, n in enumerate(rng.integers(1, 40, size=50))]
    batches = pack(samples, token_budget=64)
    assert sorted(i for batch in batches for i in batch.sample_index.tolist()) == list(range(50))
    for batch in batches:
        assert batch.num_tokens == len(batch.targets) == len(batch.weights) == batch.cu_seqlens[-1] <= 64
        kinds = [
            getattr(batch, name).dtype for name in ("input_ids", "targets", "weights", "cu_seqlens", "sample_index")
        ]
        assert kinds == [torch.int64, torch.int64, torch.float32, torch.int32, torch.int64]
        for place, number in enumerate(batch.sample_index.tolist()):
            span = slice(batch.cu_seqlens[place], batch.cu_seqlens[place + 1])
            assert np.array_equal(batch.input_ids[span], samples[number].input_ids)
            assert np.array_equal(batch.targets[span], samples[number].targets)
            assert np.array_equal(batch.weights[span], samples[number].weights)


def test_targets_never_cross_documents(tmp_path):
    index = make_corpus(tmp_path / "c", ["ACGTACGT" * 3] * 4)
    plan = SamplePlan(index, objective="next_token", max_length=24, seed=0)
    (batch,) = pack(iterate_samples(plan, range(4)), token_budget=96)
    last = batch.cu_seqlens[1:] - 1
    assert (batch.targets[last] == IGNORED).all()
    assert (batch.weights[last] == 0).all()
    inner = torch.ones(96, dtype=torch.bool)
    inner[last] = False
    assert (batch.targets[inner] == batch.input_ids.roll(-1)[inner]).all()


def test_a_sample_longer_than_the_budget_is_refused():
    with pytest.raises(InputError, match="sample 1 has 11 tokens, more than token_budget=10"):
        pack([sample(0, 3), sample(1, 11)], token_budget=10)


def test_nothing_gives_nothing():
    assert pack([], token_budget=4) == []


def test_to_moves_every_tensor():
    moved = pack([sample(0, 3)], token_budget=4)[0].to("meta")
    assert {moved.input_ids.device.type, moved.sample_index.device.type, moved.cu_seqlens.device.type} == {"meta"}
