from __future__ import annotations

import pytest
import torch
from tests.storage import LargestStorage
from torch.nn.attention.bias import causal_lower_right

from cistron.models.evo2 import attention
from cistron.models.evo2.attention import attend_to_past
from cistron.models.evo2.cache import AttentionState

SCALE = 0.3


def naive(q, keys, values, starts):
    """Attention of one query after the other, in fp64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for row, start in enumerate(starts):
        for i in range(q.shape[2]):
            seen = slice(0, start + i + 1)
            scores = torch.einsum("ad,atd->at", q[row, :, i].double(), keys[row, :, seen].double()) * SCALE
            out[row, :, i] = torch.einsum("at,atd->ad", scores.softmax(-1), values[row, :, seen].double())
    return out


def tensors(batch, length, total, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length + total)
    shapes = [(batch, 2, length, 8), (batch, 2, total, 8), (batch, 2, total, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("length", [1, 2, 10, 33])
@pytest.mark.parametrize("starts", [(7, 7, 7), (40,), (0, 12, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_each_token_sees_its_past_and_no_future(monkeypatch, length, starts, dtype, tolerance):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    q, keys, values = tensors(len(starts), length, max(starts) + length, dtype)
    out = attend_to_past(q, keys, values, starts, scale=SCALE)
    assert out.dtype == dtype
    assert (out - naive(q, keys, values, starts)).abs().max() < tolerance


def test_the_form_for_accelerators_is_the_same():
    q, keys, values = tensors(2, 6, 17)
    mask = causal_lower_right(6, 17)
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=SCALE)
    assert (out - naive(q, keys, values, (11, 11))).abs().max() < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("starts", [(300, 300), (300, 5)])
def test_on_cuda(starts):
    q, keys, values = tensors(2, 70, 370)
    out = attend_to_past(q.cuda(), keys.cuda(), values.cuda(), starts, scale=SCALE)
    assert (out.cpu() - naive(q, keys, values, starts)).abs().max() < 1e-4


@pytest.mark.parametrize("starts", [(8_000, 8_000), (8_000, 3)])
def test_memory_is_not_queries_times_keys(starts):
    q, keys, values = tensors(2, 500, 8_500)
    with LargestStorage() as largest:
        attend_to_past(q, keys, values, starts, scale=SCALE)
    assert largest.nbytes <= keys.numel() * 4


def test_buffers_grow_by_a_quarter_and_keep_what_they_hold():
    keys = torch.randn(2, 3, 100, 4)
    state = AttentionState(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4), (0, 0))
    rooms = set()
    for part in keys.split(1, dim=2):
        found, _ = state.append(part, -part, None)
        rooms.add(state.keys.shape[2])
    assert torch.equal(found, keys)
    assert torch.equal(state.values[:, :, :100], -keys)
    assert max(rooms) <= 125
    assert len(rooms) < 25


def test_rows_with_padding_store_each_behind_its_own_last_token():
    state = AttentionState(torch.zeros(2, 1, 4, 1), torch.zeros(2, 1, 4, 1), (0, 0))
    parts = torch.arange(1.0, 13).view(2, 1, 6, 1)
    state.append(parts[:, :, :3], parts[:, :, :3], torch.tensor([3, 1]))
    state.append(parts[:, :, 3:], parts[:, :, 3:], torch.tensor([2, 3]))
    assert state.lengths == (5, 4)
    assert state.keys[0, 0, :5, 0].tolist() == [1, 2, 3, 4, 5]
    assert state.keys[1, 0, :4, 0].tolist() == [7, 10, 11, 12]
    chosen = state.select(torch.tensor([1, 1]))
    assert chosen.lengths == (4, 4)
    assert chosen.values[1, 0, :4, 0].tolist() == [7, 10, 11, 12]
