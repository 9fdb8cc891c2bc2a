from __future__ import annotations

import pytest
import torch
from tests.storage import LargestStorage
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError
from cistron.inference.chunked import forward_chunks
from cistron.inference.score import score_sequences
from cistron.models.evo2.cache import AttentionState

LENGTHS = [70, 3, 64, 69]


def batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.tensor(list(b"ACGT"))[torch.randint(0, 4, (len(lengths), max(lengths)), generator=generator)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 1), mask


def joined(pieces, name=None):
    return torch.cat([output.logits if name is None else output.hidden_states[name] for _, output in pieces], dim=1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 69, 70, 1000])
def test_pieces_are_the_whole(chunk):
    model, (ids, mask) = tiny_evo2(), batch()
    with torch.inference_mode():
        whole = model(ids, attention_mask=mask, hidden_states=(2, "final_norm"))
    pieces = list(forward_chunks(model, ids, mask, chunk=chunk, hidden_states=(2, "final_norm")))
    assert [start for start, _ in pieces] == list(range(0, 70, chunk))
    assert all(output.logits.shape[1] <= chunk for _, output in pieces)
    assert (joined(pieces) - whole.logits)[mask].abs().max() < 1e-4
    for name, states in whole.hidden_states.items():
        assert (joined(pieces, name) - states)[mask].abs().max() < 1e-4
    assert not pieces[0][1].logits.requires_grad


def test_rows_of_one_length_meet_no_masks():
    model, (ids, mask) = tiny_evo2(), batch([50, 50])
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    list(forward_chunks(model, ids, mask, chunk=20))
    assert seen == [None, None, None]


@pytest.mark.parametrize("chunk", [7, 60, 500])
def test_a_given_cache_is_continued(chunk):
    model, (ids, mask) = tiny_evo2(), batch()
    prefix, _ = batch([30] * 4)
    cache = model.new_cache(4)
    list(forward_chunks(model, prefix, torch.ones_like(prefix, dtype=torch.bool), chunk=chunk, cache=cache))
    logits = joined(forward_chunks(model, ids, mask, chunk=chunk, cache=cache))
    assert cache.lengths.tolist() == [30 + length for length in LENGTHS]
    with torch.inference_mode():
        whole = model(torch.cat([prefix, ids], dim=1)).logits[:, 30:]
    assert (logits - whole)[mask].abs().max() < 1e-4


def test_room_for_the_keys_is_made_once(monkeypatch):
    grown = []
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *_: grown.append(1))
    model, (ids, _) = tiny_evo2(layer_pattern="**"), batch()
    caches = [model.new_cache(4, reserve=70)]
    with torch.inference_mode():
        for part in ids.split(13, dim=1):
            model(part, cache=caches[0])
    states = [state for state in caches[0].layers if isinstance(state, AttentionState)]
    assert [state.keys.shape[2] for state in states] == [70, 70]
    assert not grown


def test_a_model_that_reads_both_sides_runs_whole():
    model, (ids, mask) = tiny_esm2(), batch([9, 4])
    pieces = list(forward_chunks(model, ids % 20 + 4, mask, chunk=2))
    with torch.inference_mode():
        assert torch.equal(joined(pieces), model(ids % 20 + 4, attention_mask=mask).logits)
    with pytest.raises(InputError, match="cannot continue a cache"):
        list(forward_chunks(model, ids, mask, chunk=2, cache=tiny_evo2().new_cache(2)))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        list(forward_chunks(tiny_evo2(), *batch(), chunk=0))


@pytest.mark.parametrize(("pattern", "bytes_per_token"), [("SDHSDH", 0), ("SDH*", 32 * 4)])
def test_only_keys_and_values_grow_with_the_length(pattern, bytes_per_token):
    model, sizes = tiny_evo2(layer_pattern=pattern, max_length=10_000), []
    for length in (300, 1200):
        with LargestStorage() as largest:
            score_sequences(model, ["ACGT" * (length // 4)], token_budget=100)
        sizes.append(largest.nbytes)
    assert sizes[0] > 0
    assert sizes[1] <= max(sizes[0], 1200 * bytes_per_token)
