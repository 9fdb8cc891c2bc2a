from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cistron.errors import InputError
from cistron.inference.sampling import Sampling, UniformStream, generators, letter_ids, sample

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0, 1.0]])
DRAWS = 20_000


def frequencies(sampling: Sampling) -> torch.Tensor:
    """Return how often each token is chosen over evenly spread random numbers."""
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    chosen = sample(LOGITS.expand(DRAWS, -1), uniforms, sampling)
    return torch.bincount(chosen, minlength=LOGITS.shape[1]) / DRAWS


def expected(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    probabilities = torch.zeros(LOGITS.shape[1])
    probabilities[kept] = (LOGITS[0, kept] / temperature).softmax(0)
    return probabilities


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=0), [0, 1, 2, 3, 4, 5]),
        (Sampling(top_k=3), [0, 3, 5]),
        (Sampling(top_k=1), [3]),
        (Sampling(top_k=0, allowed_ids=(1, 4, 5)), [1, 4, 5]),
        (Sampling(top_k=2, allowed_ids=(1, 4, 5)), [4, 5]),
        (Sampling(top_k=4, allowed_ids=(1, 2)), [1, 2]),
        # The most likely token has probability 0.60, the first two 0.82, the first three 0.90.
        (Sampling(top_k=0, top_p=0.5), [3]),
        (Sampling(top_k=0, top_p=0.7), [0, 3]),
        (Sampling(top_k=0, top_p=0.85), [0, 3, 5]),
    ],
)
def test_tokens_are_drawn_from_the_kept_ones_in_proportion(sampling: Sampling, kept: list[int]):
    torch.testing.assert_close(frequencies(sampling), expected(kept), atol=2e-4, rtol=0)


def test_temperature_divides_the_logits_before_top_p_looks():
    hot = Sampling(temperature=3.0, top_k=0)
    torch.testing.assert_close(frequencies(hot), expected([0, 1, 2, 3, 4, 5], 3.0), atol=2e-4, rtol=0)
    # At temperature 0.2 the most likely token alone has probability 0.99, so top_p keeps only that.
    cold = Sampling(temperature=0.2, top_k=0, top_p=0.9)
    assert frequencies(cold)[3] == 1


def test_a_tiny_temperature_is_greedy_and_never_nan():
    assert frequencies(Sampling(temperature=1e-300, top_k=0))[3] == 1


def test_greedy_takes_the_lowest_of_equal_ids():
    assert sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.float64), Sampling(top_k=1)).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0; greedy decoding is top_k=1"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"temperature": float("inf")}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be from 0 .all. to the vocabulary's 512, got -1"),
        ({"temperature": None}, "temperature must be above 0, got None"),
        ({"top_k": 513}, "got 513"),
        ({"top_k": 2.0}, "top_k must be from 0 .* got 2.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"allowed_ids": (65, 600)}, "allowed: 'ɘ' is not among the model's 512 tokens"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Sampling(**settings).validated(vocab_size=512)


def test_letters_to_ids():
    assert letter_ids("TACG") == (65, 67, 71, 84)
    assert letter_ids(None) is None
    with pytest.raises(InputError, match="at least one letter"):
        letter_ids("")
    with pytest.raises(InputError, match="'€' is not a single byte"):
        letter_ids("A€")
    with pytest.raises(InputError, match="'CG' is not a single byte"):
        letter_ids(["A", "CG"])  # type: ignore[arg-type]


def draws(prompts: list[str], seed: int | list[int] | None) -> list[float]:
    return [torch.rand((), generator=generator).item() for generator in generators(prompts, seed)]


def test_a_prompts_stream_does_not_depend_on_the_others_but_repeats_differ():
    assert draws(["AC", "GT", "TT"], 7)[1] == draws(["GT"], 7)[0]
    first, second = draws(["AC", "AC"], 7)
    assert first != second
    assert draws(["AC", "GT"], [3, 4]) == [draws(["AC"], 3)[0], draws(["GT"], 4)[0]]
    assert draws(["AC"], None) != draws(["AC"], None)
    assert generators(["AC"], np.int64(7))[0].initial_seed() == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seed", "message"), [([1], "got 1 seeds for 2 prompts"), (-1, "seed must be from 0"), (1 << 64, "seed must be")]
)
def test_bad_seeds(seed: int | list[int], message: str):
    with pytest.raises(InputError, match=message):
        generators(["AC", "GT"], seed)


def test_a_stream_is_uniform_and_does_not_depend_on_how_much_is_drawn():
    first, second = (UniformStream(torch.Generator().manual_seed(5)) for _ in range(2))
    drawn = [first.next() for _ in range(1000)]
    assert [second.next() for _ in range(70)] == drawn[:70]
    assert len(set(drawn)) == 1000
    assert sum(drawn) / 1000 == pytest.approx(0.5, abs=0.03)


def test_greedy_among_allowed_letters_takes_the_lowest_of_equal_ids():
    chosen = sample(torch.zeros(2, 90), torch.zeros(2, dtype=torch.float64), Sampling(top_k=1, allowed_ids=(65, 84)))
    assert chosen.tolist() == [65, 65]
