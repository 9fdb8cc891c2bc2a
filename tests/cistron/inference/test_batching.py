from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.batching import check_token_budget, checked_sequences, length_sorted_batches, packed, padded


@pytest.mark.parametrize("token_budget", [1, 7, 40, 1000])
def test_every_sequence_is_in_one_batch_within_the_budget(token_budget: int):
    lengths = [random.Random(token_budget).randint(1, 30) for _ in range(50)]
    batches = list(length_sorted_batches(lengths, token_budget=token_budget))
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= token_budget


def test_padding_is_on_the_right_and_masked():
    ids, mask = padded([np.array([5, 6, 7]), np.array([8])], pad_id=1, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_packed_rows_lie_end_to_end():
    ids, cu_seqlens = packed([np.array([5, 6, 7]), np.array([8])], device=torch.device("cpu"))
    assert ids.tolist() == [5, 6, 7, 8]
    assert cu_seqlens.tolist() == [0, 3, 4]
    assert (ids.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], InputError, "sequences: the request is empty"),
        ("ACGT", InputError, "give a list of strings, not one string"),
        (["ACGT", 3], InputError, "sequence 1: must be a string, got int"),
        (["ACGT", ""], SequenceError, "sequence 1: the sequence is empty"),
        (["ACGT", "ACXT"], SequenceError, "sequence 1: letter 'X' at position 3"),
        (["MKTAYIAKQR"], SequenceError, "sequence 0: .*looks like a protein"),
        (["ACGT", "A" * 257], SequenceError, "sequence 1: 257 nt is longer than the limit of 256"),
    ],
)
def test_a_bad_request_names_the_place(sequences: list[str], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        checked_sequences(tiny_evo2(), sequences)


def test_proteins_are_read_in_upper_case():
    assert checked_sequences(tiny_esm2(), ["mkTa"]) == ["MKTA"]


def test_a_protein_longer_than_any_in_training_is_read_with_a_warning(caplog: pytest.LogCaptureFixture):
    model = tiny_esm2(max_position_embeddings=14)
    assert checked_sequences(model, ["A" * 10]) == ["A" * 10]
    assert not caplog.records
    assert checked_sequences(model, ["A", "A" * 11]) == ["A", "A" * 11]
    assert "11 residues, but was trained on 10" in caplog.text


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(InputError, match="token_budget must be at least 1, got 0"):
        check_token_budget(0)
