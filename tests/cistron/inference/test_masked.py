from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.masked import masked_log_probs, pseudo_perplexity
from cistron.inference.score import score_sequences
from cistron.models.base import SequenceModel

PROTEINS = ["MKTAYIAKQRQISFVKSH", "G", "MEEPQSDPSVX"]


def naive(model: SequenceModel, sequence: str, *, window: int = 1022) -> list[float]:
    """Each residue's log-probability: one unpadded forward pass per residue, on its own window."""
    values = []
    for i, residue in enumerate(sequence):
        start = max(0, min(i - window // 2, len(sequence) - window))
        part = sequence[start : start + window]
        hidden = part[: i - start] + "<mask>" + part[i - start + 1 :]
        with torch.no_grad():
            logits = model(torch.from_numpy(model.tokenizer.encode(hidden))[None]).logits[0, 1 + i - start]
        values.append(logits.double().log_softmax(-1)[model.tokenizer.encode(residue)[1]].item())
    return values


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("token_budget", [1, 25, 10_000])
def test_packed_passes_are_single_passes(window: int | None, token_budget: int):
    model = tiny_esm2()
    found = masked_log_probs(model, PROTEINS, window=window, token_budget=token_budget)
    for sequence, values in zip(PROTEINS, found, strict=True):
        np.testing.assert_allclose(values, naive(model, sequence, window=window or 1022), atol=1e-5)


def test_pseudo_perplexity_masks_every_residue_and_compares_it_with_itself():
    model = tiny_esm2()
    for sequence, value in zip(PROTEINS, pseudo_perplexity(model, PROTEINS, token_budget=40), strict=True):
        log_probs = naive(model, sequence)
        assert value == pytest.approx(math.exp(-sum(log_probs) / len(sequence)), rel=1e-5)
        assert value == pytest.approx(math.exp(-score_sequences(model, [sequence])[0].score), rel=1e-5)


def test_a_protein_longer_than_any_in_training_is_scored_in_windows():
    model = tiny_esm2(max_position_embeddings=10)
    sequence = PROTEINS[0]
    expected = naive(model, sequence, window=6)
    per_token = score_sequences(model, [sequence], reduction="none")[0].per_token
    np.testing.assert_allclose(per_token, expected, atol=1e-5)
    whole = score_sequences(model, [sequence], reduction="sum", window=len(sequence))[0].score
    assert whole == pytest.approx(sum(naive(model, sequence)), abs=1e-4)
    assert whole != pytest.approx(sum(expected), abs=1e-2)


def test_what_cannot_be_scored():
    with pytest.raises(SequenceError, match="sequence 1: <mask> at position 2 has no residue to score"):
        pseudo_perplexity(tiny_esm2(), ["MK", "M<mask>"])
    with pytest.raises(SequenceError, match="sequence 0: <mask> at position 1"):
        pseudo_perplexity(tiny_esm2(), ["<mask><mask>"])
    with pytest.raises(InputError, match="needs an ESM-2 model, and this is evo2"):
        pseudo_perplexity(tiny_evo2(), ["ACGT"])
    with pytest.raises(InputError, match="window must be at least 1 residue"):
        pseudo_perplexity(tiny_esm2(), ["MK"], window=0)
    with pytest.raises(InputError, match="window applies to protein models, and this is evo2"):
        score_sequences(tiny_evo2(), ["ACGT"], window=3)
