from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.substitutions import RESIDUE_ORDER, substitution_matrix
from cistron.inference.variants import score_variants
from cistron.models.base import SequenceModel

WILD_TYPE = "MKTAYIAKQRQXUFVKSHFSR"


def log_probs(model: SequenceModel, sequence: str) -> np.ndarray:
    """[L, V] of one sequence alone."""
    with torch.no_grad():
        logits = model(torch.from_numpy(model.tokenizer.encode(sequence))[None]).logits[0, 1:-1]
    return logits.double().log_softmax(-1).numpy()


def naive_profile(model: SequenceModel, strategy: str, window: int) -> np.ndarray:
    """[L, V]: masked, one pass per residue; unmasked, windows half their length apart, averaged one residue a time."""
    length = len(WILD_TYPE)
    rows = []
    starts = [*range(0, max(1, length - window), window // 2), *([length - window] if length > window else [])]
    seen = {start: log_probs(model, WILD_TYPE[start : start + window]) for start in starts}
    for i in range(length):
        if strategy == "masked-marginal":
            start = max(0, min(i - window // 2, length - window))
            part = WILD_TYPE[start : start + window]
            rows.append(log_probs(model, part[: i - start] + "<mask>" + part[i - start + 1 :])[i - start])
            continue
        total, weights = np.zeros(model.tokenizer.vocab_size), 0.0
        for start in (start for start in starts if start <= i < start + window):
            weight = 1.0
            for cut, distance in ((start > 0, i - start + 1), (start + window < length, start + window - i)):
                weight /= 1 + np.exp(8 - 64 * distance / (window + 2)) if cut else 1
            total += weight * seen[start][i - start]
            weights += weight
        rows.append(total / weights)
    return np.array(rows)


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
@pytest.mark.parametrize(("window", "token_budget"), [(1000, 1), (8, 25), (9, 10_000)])
def test_the_matrix_is_the_difference_of_naive_log_probabilities(strategy: Any, window: int, token_budget: int):
    model = tiny_esm2()
    matrix = substitution_matrix(model, WILD_TYPE.lower(), strategy=strategy, window=window, token_budget=token_budget)
    assert matrix.shape == (len(WILD_TYPE), 20)
    expected = naive_profile(model, strategy, window)
    for i, wild in enumerate(WILD_TYPE):
        for column, mutant in enumerate(RESIDUE_ORDER):
            ids = model.tokenizer.encode(mutant + wild)
            assert matrix[i, column] == pytest.approx(expected[i, ids[1]] - expected[i, ids[2]], abs=1e-5)
            assert matrix[i, column] == 0 or mutant != wild


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
def test_rows_of_the_matrix_can_be_asked_for(strategy: Any):
    model = tiny_esm2()
    whole = substitution_matrix(model, WILD_TYPE, strategy=strategy)
    some = substitution_matrix(model, WILD_TYPE, strategy=strategy, positions=[4, 0, 20])
    np.testing.assert_allclose(some, whole[[4, 0, 20]], atol=1e-6)
    with pytest.raises(InputError, match="position 21 is outside the protein, which has 21 residues"):
        substitution_matrix(model, WILD_TYPE, strategy=strategy, positions=[0, 21])


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
def test_positions_may_repeat_and_be_numpys(strategy: Any, monkeypatch: pytest.MonkeyPatch):
    model = tiny_esm2()
    whole = substitution_matrix(model, WILD_TYPE, strategy=strategy)
    fresh = np.empty

    def poisoned(shape: Any, *args: Any, **options: Any) -> np.ndarray:
        array = fresh(shape, *args, **options)
        if array.dtype.kind == "f":
            array.fill(np.nan)  # What is never written must show, and fresh memory is often zero.
        return array

    monkeypatch.setattr(np, "empty", poisoned)
    for positions in ([3, 3, 1, 3], np.array([3, 3, 1, 3]), [np.int32(3), 3, np.uint8(1), 3]):
        some = substitution_matrix(model, WILD_TYPE, strategy=strategy, positions=positions)
        np.testing.assert_allclose(some, whole[[3, 3, 1, 3]], atol=1e-6, equal_nan=False)
    assert substitution_matrix(model, WILD_TYPE, strategy=strategy, positions=[]).shape == (0, 20)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([1.5], "positions must be 0-based integers, got 1.5"),
        (["1"], "positions must be 0-based integers, got '1'"),
        ([None], "positions must be 0-based integers, got None"),
        (5, "positions must be a list of 0-based integers, got 5"),
        ("12", "positions must be a list of 0-based integers, got '12'"),
        ([-1], "position -1 is outside the protein"),
    ],
)
def test_positions_that_are_none(positions: Any, message: str):
    for strategy in ("masked-marginal", "wt-marginal"):
        with pytest.raises(InputError, match=message):
            substitution_matrix(tiny_esm2(), WILD_TYPE, strategy=strategy, positions=positions)


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
@pytest.mark.parametrize("window", [None, 8])
def test_variants_read_the_matrix_and_add_up(strategy: Any, window: int | None):
    model = tiny_esm2()
    matrix = substitution_matrix(model, WILD_TYPE, strategy=strategy, window=window)
    at = {letter: column for column, letter in enumerate(RESIDUE_ORDER)}
    variants = ["K2A", "p.Lys2Trp", "K2A:S17R", "p.[Arg21Ala;Met1Cys]", "p.=", "K2=", "K2K"]
    scores = score_variants(model, variants, WILD_TYPE, strategy=strategy, window=window).to_pydict()
    assert scores["variant"] == variants
    expected = [
        matrix[1, at["A"]],
        matrix[1, at["W"]],
        matrix[1, at["A"]] + matrix[16, at["R"]],
        matrix[20, at["A"]] + matrix[0, at["C"]],
        *(0.0, 0.0, 0.0),
    ]
    assert scores["score"] == pytest.approx(expected, abs=1e-6)


def test_a_position_is_masked_once_for_all_variants(monkeypatch: pytest.MonkeyPatch):
    model, masked = tiny_esm2(), Counter()
    forward = type(model).forward

    def counted(self: SequenceModel, input_ids: torch.Tensor, *, cu_seqlens: torch.Tensor) -> Any:
        for document in input_ids.tensor_split(cu_seqlens[1:-1].tolist()):
            masked.update((document == 32).nonzero()[:, 0].tolist())
        return forward(self, input_ids, cu_seqlens=cu_seqlens)

    monkeypatch.setattr(type(model), "forward", counted)
    score_variants(model, ["K2A", "K2W:A4G", "K2C", "A4T"], WILD_TYPE)
    assert masked == {2: 1, 4: 1}
    masked.clear()
    substitution_matrix(model, WILD_TYPE)
    assert masked == dict.fromkeys(range(1, len(WILD_TYPE) + 1), 1)


def test_pseudo_likelihoods_of_long_proteins_are_of_windows():
    model = tiny_esm2()
    table = score_variants(model, ["K2A:F14M"], WILD_TYPE, strategy="pseudo-ppl", window=8)
    total = 0.0
    for sign, sequence in ((1, WILD_TYPE.replace("MK", "MA").replace("UF", "UM")), (-1, WILD_TYPE)):
        for i, residue in enumerate(sequence):
            start = max(0, min(i - 4, len(sequence) - 8))
            part = sequence[start : start + 8]
            hidden = part[: i - start] + "<mask>" + part[i - start + 1 :]
            total += sign * log_probs(model, hidden)[i - start][model.tokenizer.encode(residue)[1]]
    assert table["score"].to_pylist() == pytest.approx([total], abs=1e-4)


@pytest.mark.parametrize(
    ("sequence", "options", "error", "message"),
    [
        ("MKT*", {}, SequenceError, "sequence: letter '[*]' at position 4"),
        ("", {}, SequenceError, "sequence: the sequence is empty"),
        ("MK<mask>T", {}, SequenceError, "sequence: <mask> at position 3 has no residue to score"),
        ("MK-T", {}, SequenceError, "sequence: letter '-' at position 3 .*; remove alignment gaps"),
        (None, {}, InputError, "sequence must be the wild-type protein sequence, got a NoneType"),
        ("MKT", {"window": "8"}, InputError, "window must be a whole number of residues, got '8'"),
        ("ACGT" * 10, {}, SequenceError, "sequence: this looks like DNA"),
        (
            "MKT",
            {"strategy": "pseudo-ppl"},
            InputError,
            "must be one of masked-marginal, wt-marginal, got 'pseudo-ppl'",
        ),
        ("MKT", {"window": 0}, InputError, "window must be at least 1 residue, got 0"),
        ("MKT", {"token_budget": 0}, InputError, "token_budget must be .*at least 1"),
    ],
)
def test_bad_requests_for_a_matrix(sequence: str, options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        substitution_matrix(tiny_esm2(), sequence, **options)


def test_a_dna_model_has_no_residues():
    with pytest.raises(InputError, match="need an ESM-2 model, and this is evo2"):
        substitution_matrix(tiny_evo2(), "MKT")


def test_a_wild_type_with_an_unknown_residue_is_refused():
    with pytest.raises(SequenceError, match="reference: <mask> at position 3 has no residue to score"):
        score_variants(tiny_esm2(), ["K2A"], "MK<mask>T")
