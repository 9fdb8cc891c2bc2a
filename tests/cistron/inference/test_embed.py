from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.storage import LargestStorage
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError, UnknownNameError
from cistron.inference.embed import embed_sequences
from cistron.models.base import SequenceModel

DNA = ["ACGTACGTTGCA", "GG", "TTACGNacgtRYACGATC"]
PROTEINS = ["MKTAYIAKQR", "G", "MEEPQ<mask>DPSVEP"]


def states(model: SequenceModel, sequence: str, layer: str) -> np.ndarray:
    """Representations of one sequence alone, special tokens included."""
    ids = torch.from_numpy(model.tokenizer.encode(sequence))[None]
    with torch.no_grad():
        return model(ids, hidden_states=(layer,)).hidden_states[layer][0].numpy()


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_mean_is_over_nucleotides_or_residues_only(token_budget: int):
    for model, sequences, special in ((tiny_evo2(), DNA, 0), (tiny_esm2(), PROTEINS, 1)):
        for sequence, result in zip(
            sequences, embed_sequences(model, sequences, token_budget=token_budget), strict=True
        ):
            expected = states(model, sequence, "final_norm")
            expected = expected[special : len(expected) - special]
            np.testing.assert_allclose(result.vectors[-1], expected.mean(axis=0), atol=1e-5)
            assert result.num_tokens == len(expected)
            assert result.vectors[-1].dtype == np.float32


def test_every_pooling():
    model = tiny_esm2()
    whole = states(model, PROTEINS[0], "blocks.1")
    for pooling, expected in (("none", whole[1:-1]), ("cls", whole[0]), ("last", whole[-2])):
        results = embed_sequences(model, PROTEINS, layers=["blocks.1"], pooling=pooling)
        np.testing.assert_allclose(results[0].vectors["blocks.1"], expected, atol=1e-5)
    last = embed_sequences(tiny_evo2(), DNA, pooling="last")[1].vectors[-1]
    np.testing.assert_allclose(last, states(tiny_evo2(), DNA[1], "final_norm")[-1], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("token_budget", [5, 16])
def test_pooling_by_chunks(pooling: Any, token_budget: int):
    model, sequences, layers = tiny_evo2(), [DNA[2], "ACGT" * 10, "A"], [2, "blocks.3.mlp", "logits", -1]
    whole = embed_sequences(model, sequences, layers=layers, pooling=pooling)
    chunked = embed_sequences(model, sequences, layers=layers, pooling=pooling, token_budget=token_budget)
    for a, b in zip(whole, chunked, strict=True):
        assert a.num_tokens == b.num_tokens
        for layer in layers:
            assert a.vectors[layer].shape == b.vectors[layer].shape
            np.testing.assert_allclose(a.vectors[layer], b.vectors[layer], atol=1e-5)


def test_a_long_mean_is_pooled_as_it_comes():
    sizes, model = [], tiny_evo2(layer_pattern="SDH", max_length=10_000)
    for length in (300, 1200):
        with LargestStorage() as largest:
            embed_sequences(model, ["ACGT" * (length // 4)], layers=[1, "blocks.2.mlp"], token_budget=100)
        sizes.append(largest.nbytes)
    assert sizes[0] == sizes[1]


def test_a_small_vector_does_not_hold_the_batch_in_memory():
    vector = embed_sequences(tiny_evo2(), ["ACGT" * 20], pooling="last")[0].vectors[-1]
    assert vector.base is None or vector.base.nbytes == vector.nbytes


def test_layers_keep_the_spelling_of_the_request():
    model = tiny_evo2()
    layers = ["embedding", 2, "decoder.layers.2", "norm", -1, -2]
    vectors = embed_sequences(model, DNA, layers=layers)[0].vectors
    assert list(vectors) == layers
    np.testing.assert_array_equal(vectors[2], vectors["decoder.layers.2"])
    np.testing.assert_array_equal(vectors["norm"], vectors[-1])
    np.testing.assert_allclose(vectors[-2], states(model, DNA[0], "blocks.4").mean(axis=0), atol=1e-5)
    assert not np.allclose(vectors["embedding"], vectors[2])


def test_numpys_integers_are_indices():
    asked = embed_sequences(tiny_evo2(), DNA[:1], layers=np.array([-1, 2]))[0].vectors
    want = embed_sequences(tiny_evo2(), DNA[:1], layers=[-1, 2])[0].vectors
    np.testing.assert_array_equal([asked[-1], asked[2]], [want[-1], want[2]])


def test_vectors_of_a_bf16_model_are_fp32():
    result = embed_sequences(tiny_esm2().bfloat16(), ["MKT"])[0]
    assert result.vectors[-1].dtype == np.float32


@pytest.mark.parametrize(
    ("sequences", "options", "error", "message"),
    [
        ([], {}, InputError, "the request is empty"),
        (["AC!"], {}, SequenceError, "sequence 0: letter '!' at position 3"),
        (["A" * 257], {}, SequenceError, "longer than the limit of 256"),
        (["ACGT"], {"pooling": "max"}, InputError, "pooling must be one of mean, cls, last, none, got 'max'"),
        (["ACGT"], {"pooling": "cls"}, InputError, "needs a <cls> token, which evo2 does not have"),
        (["ACGT"], {"layers": ()}, InputError, "at least one name or index"),
        (["ACGT"], {"layers": "blocks.1"}, InputError, "must be a list"),
        (["ACGT"], {"layers": 1.0}, InputError, "must be a list of at least one name or index, got 1.0"),
        (["ACGT"], {"layers": None}, InputError, "must be a list of at least one name or index, got None"),
        (["ACGT"], {"layers": [-1, 1.0]}, InputError, "layers must be names or integers, got 1.0"),
        (["ACGT"], {"layers": [None]}, InputError, "layers must be names or integers, got None"),
        (["ACGT"], {"layers": [True]}, InputError, "layers must be names or integers, got True"),
        (["ACGT"], {"layers": ("blocks.9",)}, UnknownNameError, "unknown layer 'blocks.9'"),
        (["ACGT"], {"layers": (17,)}, UnknownNameError, "unknown layer 17"),
        (["ACGT"], {"token_budget": -1}, InputError, "token_budget must be .*at least 1"),
    ],
)
def test_bad_requests(sequences: list[str], options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        embed_sequences(tiny_evo2(), sequences, **options)
