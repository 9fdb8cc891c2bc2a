from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cistron.errors import InputError
from cistron.models.evo2.cache import AttentionState, Cache, FirState
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_vortex
from cistron.models.evo2.model import Evo2

GOLDEN = Path(__file__).parents[2] / "golden"


def load(name):
    config, tensors = read_vortex(GOLDEN / f"{name}.vortex.safetensors", config=None, trust_pickle=False)
    model = Evo2(config)
    model.load_state_dict(dict(tensors))
    return model.eval()


@pytest.fixture(scope="module", params=["evo2_tiny", "evo2_tiny_longrope"])
def golden(request):
    return load(request.param), load_file(GOLDEN / f"{request.param}.golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return load("evo2_tiny")


def tokens(*shape, seed=0):
    return torch.tensor(list(b"ACGTN"))[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))]


def remembered(state):
    """Of the operator: its last inputs, or its modal state."""
    return state.operator.last() if isinstance(state.operator, FirState) else state.operator


def relative_state_difference(first, second):
    """Of everything that a later token can see, in units of each state's largest entry."""
    assert torch.equal(first.lengths, second.lengths)
    differences = []
    for one, two in zip(first.layers, second.layers, strict=True):
        if isinstance(one, AttentionState):
            visible = [
                (a[row, :, :n], b[row, :, :n])
                for a, b in ((one.keys, two.keys), (one.values, two.values))
                for row, n in enumerate(first.lengths.tolist())
            ]
        else:
            visible = [(one.projection.last(), two.projection.last()), (remembered(one), remembered(two))]
        differences += [(a - b).abs().max() / b.abs().max() for a, b in visible]
    return max(differences).item()


@pytest.mark.parametrize("chunk", [1, 7, 64, 210])
@torch.inference_mode()
def test_chunks_of_any_size_equal_the_whole(golden, chunk):
    model, expected = golden
    whole = model(expected["input_ids"]).logits
    cache = model.new_cache(2)
    logits = torch.cat([model(ids, cache=cache).logits for ids in expected["input_ids"].split(chunk, dim=1)], dim=1)
    assert (logits - whole).abs().max() < 1e-4
    assert (logits - expected["logits"]).abs().max() < 2e-4
    assert cache.lengths.tolist() == [210, 210]


@torch.inference_mode()
def test_greedy_continuation_through_the_cache_equals_the_published_package(golden):
    model, expected = golden
    cache = model.new_cache(1)
    ids, generated = expected["prompt_ids"], []
    for _ in range(expected["greedy_ids"].shape[1]):
        ids = model(ids, cache=cache).logits[:, -1:].argmax(-1)
        generated.append(ids)
    assert torch.equal(torch.cat(generated, dim=1), expected["greedy_ids"])


@pytest.mark.parametrize("length", range(1, 9))
@torch.inference_mode()
def test_prompts_shorter_than_the_filters_continue_exactly(model, length):
    ids = tokens(1, length + 6, seed=length)
    whole = model(ids).logits
    cache = model.new_cache(1)
    pieces = [model(ids[:, :length], cache=cache).logits]
    pieces += [model(ids[:, t : t + 1], cache=cache).logits for t in range(length, length + 6)]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [3, 64, 200])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)]
)  # rotary angles are fp32
@torch.inference_mode()
def test_rows_of_mixed_lengths_continue_after_their_own_last_token(chunk, dtype, tolerance):
    model = load("evo2_tiny").to(dtype)
    lengths = [1, 2, 5, 130, 64]
    rows = [tokens(length, seed=length) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = torch.arange(130) < torch.tensor(lengths)[:, None]
    cache = model.new_cache(5)
    for start in range(0, 130, chunk):
        model(ids[:, start : start + chunk], attention_mask=mask[:, start : start + chunk], cache=cache)
    assert cache.lengths.tolist() == lengths
    continuation = tokens(5, 8, seed=99)
    batched = torch.cat([model(continuation[:, t : t + 1], cache=cache).logits for t in range(8)], dim=1)
    for row, ids in enumerate(rows):
        single = model.new_cache(1)
        model(ids[None], cache=single)
        alone = torch.cat([model(continuation[row : row + 1, t : t + 1], cache=single).logits for t in range(8)], dim=1)
        assert (batched[row] - alone[0]).abs().max() < tolerance * alone.abs().max()
        assert relative_state_difference(cache.select([row]), single) < tolerance
        whole = model(torch.cat([ids, continuation[row]])[None]).logits[0, len(ids) :]
        assert (batched[row] - whole).abs().max() < 1e-4


@torch.inference_mode()
def test_a_row_that_reads_nothing_keeps_its_state(model):
    cache = model.new_cache(2)
    model(tokens(2, 9), cache=cache)
    before = cache.select([0, 1])
    model(tokens(2, 1, seed=1), attention_mask=torch.tensor([[1], [0]]), cache=cache)
    assert cache.lengths.tolist() == [10, 9]
    assert relative_state_difference(before.select([1]), cache.select([1])) == 0
    assert not torch.equal(before.layers[2].operator[0], cache.layers[2].operator[0])


@torch.inference_mode()
def test_selected_rows_fork_and_do_not_share(model):
    prefix, tails = tokens(1, 20), tokens(3, 5, seed=2)
    cache = model.new_cache(1)
    model(prefix, cache=cache)
    forked = cache.select([0, 0, 0])
    logits = model(tails, cache=forked).logits
    assert (cache.lengths.tolist(), forked.lengths.tolist()) == ([20], [25, 25, 25])
    again = model(tails[1:2], cache=cache).logits
    for row in range(3):
        whole = model(torch.cat([prefix[0], tails[row]])[None]).logits[0, 20:]
        assert (logits[row] - whole).abs().max() < 1e-4
    assert (again[0] - logits[1]).abs().max() < 1e-5


@torch.inference_mode()
def test_joined_caches_continue_each_row_as_if_alone(model):
    prompts = [tokens(1, length, seed=length) for length in (3, 150, 40)]
    caches = []
    for prompt in prompts:
        caches.append(model.new_cache(1))
        model(prompt, cache=caches[-1])
    joined = Cache.concat(caches)
    assert joined.lengths.tolist() == [3, 150, 40]
    continuation = tokens(3, 20, seed=8)
    for t in range(20):
        logits = model(continuation[:, t : t + 1], cache=joined).logits
        for row, cache in enumerate(caches):
            alone = model(continuation[row : row + 1, t : t + 1], cache=cache).logits
            assert (logits[row] - alone[0]).abs().max() < 2e-5
    assert relative_state_difference(joined.select([1]), caches[1]) < 1e-5


def test_steps_reuse_the_buffer_of_the_last_inputs():
    state, seen = FirState.of(torch.zeros(1, 1, 2)), [0.0, 0.0]
    buffer = state.inputs.data_ptr()
    for step in range(1, 40):
        state.inputs[:, state.next_slot()] = step
        seen.append(float(step))
        assert state.last().flatten().tolist() == seen[-2:]
    assert (state.inputs.data_ptr(), state.inputs.shape[1]) == (buffer, 8)


def test_the_cache_runs_without_gradients(model):
    logits = model(tokens(1, 4), cache=model.new_cache(1)).logits
    assert not logits.requires_grad
    assert model(tokens(1, 4)).logits.requires_grad


@torch.inference_mode()
def test_a_bf16_model_keeps_modal_states_in_fp32():
    config = Evo2Config(
        hidden_size=16,
        layer_pattern="H*SD",
        num_attention_heads=2,
        mlp_size=24,
        num_filter_groups=4,
        max_length=64,
    )
    model = Evo2(config, dtype=torch.bfloat16)
    cache = model.new_cache(2)
    model(tokens(2, 5), cache=cache)
    model(tokens(2, 1), cache=cache)
    assert cache.layers[0].operator.dtype == torch.float32
    assert cache.layers[0].projection.inputs.dtype == cache.layers[1].keys.dtype == torch.bfloat16
    assert cache.layers[3].operator.inputs.dtype == torch.bfloat16


def test_contradictions_are_refused(model):
    with pytest.raises(InputError, match="2 rows, input_ids has 1"):
        model(tokens(1, 3), cache=model.new_cache(2))
    with pytest.raises(InputError, match="packed"):
        model(tokens(3), cu_seqlens=torch.tensor([0, 3]), cache=model.new_cache(1))
    with pytest.raises(InputError, match="batch_size=0"):
        model.new_cache(0)
