"""Embeddings of proteins longer than any in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError
from cistron.inference.embed import embed_sequences
from cistron.models.base import SequenceModel

LONG = "MKTAYIAKQRQISFVKSHFSRQLEERL"
MIXED = ["MEEPQ", LONG, "G", LONG[:9], LONG[:8]]
LAYERS = ("embedding", "blocks.1.mlp", "logits", -1)


def stitched(model: SequenceModel, sequence: str, layer: Any, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Residues [L, H] and <cls> [H], one window and one residue at a time."""
    length = len(sequence)
    starts = [*range(0, length - window, window // 2), length - window] if length > window else [0]
    seen = {}
    for start in starts:
        ids = torch.from_numpy(model.tokenizer.encode(sequence[start : start + window]))[None]
        with torch.no_grad():
            (states,) = model(ids, hidden_states=(layer,)).hidden_states.values()
        seen[start] = states[0].double().numpy()
    residues, shares = [], dict.fromkeys(starts, 0.0)
    for i in range(length):
        weights = {}
        for start in (start for start in starts if start <= i < start + window):
            weights[start] = 1.0
            for cut, distance in ((start > 0, i - start + 1), (start + window < length, start + window - i)):
                weights[start] /= 1 + np.exp(8 - 64 * distance / (window + 2)) if cut else 1
        residues.append(sum(w * seen[start][1 + i - start] for start, w in weights.items()) / sum(weights.values()))
        for start, weight in weights.items():
            shares[start] += weight / sum(weights.values()) / length
    return np.array(residues), np.sum([share * seen[start][0] for start, share in shares.items()], axis=0)


@pytest.mark.parametrize("pooling", ["none", "mean", "last", "cls"])
@pytest.mark.parametrize(("window", "token_budget"), [(8, 1), (8, 10_000), (11, 30)])
def test_windows_are_stitched_as_documented(pooling: Any, window: int, token_budget: int):
    model = tiny_esm2()
    results = embed_sequences(model, MIXED, layers=LAYERS, pooling=pooling, window=window, token_budget=token_budget)
    for sequence, result in zip(MIXED, results, strict=True):
        assert result.num_tokens == len(sequence)
        for layer in LAYERS:
            residues, cls = stitched(model, sequence, layer, window)
            expected = {"none": residues, "mean": residues.mean(axis=0), "last": residues[-1], "cls": cls}[pooling]
            assert result.vectors[layer].dtype == np.float32
            np.testing.assert_allclose(result.vectors[layer], expected, atol=1e-5)


def test_the_default_reads_what_was_seen_in_training_and_never_less(caplog: pytest.LogCaptureFixture):
    model = tiny_esm2(max_position_embeddings=14)
    caplog.set_level("INFO")
    default = embed_sequences(model, [LONG], pooling="none")[0].vectors[-1]
    assert "are read in windows of 10" in caplog.text
    assert "was trained on" not in caplog.text
    np.testing.assert_allclose(default, stitched(model, LONG, -1, 10)[0], atol=1e-5)
    whole = embed_sequences(model, [LONG], pooling="none", window=len(LONG))[0].vectors[-1]
    assert "reads 27 residues at once, but was trained on 10" in caplog.text
    np.testing.assert_allclose(whole, stitched(model, LONG, -1, 27)[0], atol=1e-5)
    assert default.shape == whole.shape == (27, 32)


def test_a_protein_of_one_window_is_untouched():
    model = tiny_esm2()
    for window in (None, len(LONG), 5000):
        a, b = embed_sequences(model, [LONG, LONG[:-1]], pooling="mean", window=window)
        ids = torch.from_numpy(model.tokenizer.encode(LONG))[None]
        with torch.no_grad():
            states = model(ids, hidden_states=(-1,)).hidden_states["final_norm"][0]
        np.testing.assert_allclose(a.vectors[-1], states[1:-1].mean(dim=0).numpy(), atol=1e-6)
        assert not np.allclose(a.vectors[-1], states.mean(dim=0).numpy(), atol=1e-3), "special tokens are pooled"
        assert not np.allclose(a.vectors[-1], b.vectors[-1], atol=1e-3)


@pytest.mark.parametrize(("window", "message"), [(0, "at least 1 residue, got 0"), (-3, "at least 1 residue, got -3")])
def test_a_window_without_a_residue(window: int, message: str):
    with pytest.raises(InputError, match=message):
        embed_sequences(tiny_esm2(), ["MKT"], window=window)


def test_windows_are_for_proteins():
    with pytest.raises(InputError, match="window applies to protein models, and this is evo2"):
        embed_sequences(tiny_evo2(), ["ACGT"], window=10)
