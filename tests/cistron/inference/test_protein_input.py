"""What ESM-2 does with sequences that are no plain protein, through every door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import tiny_esm2

from cistron.errors import InputError, SequenceError
from cistron.inference.contacts import predict_contacts
from cistron.inference.embed import embed_sequences
from cistron.inference.masked import pseudo_perplexity
from cistron.inference.score import score_sequences
from cistron.inference.variants import score_variants

DOORS: Sequence[Callable[..., Any]] = (embed_sequences, score_sequences, pseudo_perplexity, predict_contacts)
DNA = "ACGTTGCANGTACGATCGATTACGGATCGA"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "sequence 1: the sequence is empty"),
        ("MKJT", "letter 'J' at position 3 .*; write X for J"),
        ("mkjt", "letter 'j' at position 3 .*; write X for J"),
        ("MK1T", "letter '1' at position 3 .*; remove position numbers"),
        ("MKT*", "letter '[*]' at position 4 .*; remove the stop"),
        ("M*KT", "letter '[*]' at position 2"),
        ("MK T", "letter ' ' at position 3 .*; remove white space"),
        ("MKT\n", r"letter '\\n' at position 4 .*; remove white space"),
        ("MK\tT", "remove white space"),
        ("   ", "letter ' ' at position 1"),
        ("MKÄT", "letter 'Ä' at position 3"),
        ("MK<pad>", "letter '<' at position 3"),
        (
            DNA,
            r"sequence 1: this looks like DNA, .*: translate it first \(30 of its 30 letters are A, C, G, T, U or N\)",
        ),
        (DNA.lower(), "this looks like DNA"),
        (DNA.replace("T", "U"), "this looks like DNA"),
        ("MKT" * 20 + ">", "letter '>' at position 61"),
    ],
)
def test_refused_everywhere_with_the_place_and_a_remedy(door: Callable[..., Any], sequence: str, message: str):
    with pytest.raises(SequenceError, match=f"^sequence 1: .*{message.removeprefix('sequence 1: ')}"):
        door(tiny_esm2(), ["MKT", sequence])


@pytest.mark.parametrize("door", DOORS)
def test_no_request_and_no_list(door: Callable[..., Any]):
    with pytest.raises(InputError, match="the request is empty"):
        door(tiny_esm2(), [])
    with pytest.raises(InputError, match="give a list of strings"):
        door(tiny_esm2(), "MKT")
    with pytest.raises(InputError, match="sequence 0: must be a string, got bytes"):
        door(tiny_esm2(), [b"MKT"])


@pytest.mark.parametrize(
    "protein",
    ["ACGT" * 7, "A" * 60, "GATAGATA" * 8, "AGNT" * 20, DNA + "L", "ACGACGN" * 10],
    ids=["short", "alanine", "no cysteine", "AGNT", "with leucine", "neither T nor U"],
)
def test_a_protein_of_few_letters_is_no_dna(protein: str):
    assert embed_sequences(tiny_esm2(), [protein])[0].num_tokens == len(protein)


def test_lower_case_is_read_as_upper_case():
    model = tiny_esm2()
    lower, upper = embed_sequences(model, ["mktAyi<mask>x", "MKTAYI<mask>X"])
    np.testing.assert_array_equal(lower.vectors[-1], upper.vectors[-1])
    small, large = score_sequences(model, ["mktayi", "MKTAYI"])
    assert small.score == pytest.approx(large.score, abs=1e-6)


def test_gaps_are_tokens():
    model = tiny_esm2()
    with_gaps, without = embed_sequences(model, ["MK-.T", "MKT"])
    assert (with_gaps.num_tokens, without.num_tokens) == (5, 3)
    assert not np.allclose(with_gaps.vectors[-1], without.vectors[-1], atol=1e-3)


def test_one_residue():
    model = tiny_esm2()
    assert embed_sequences(model, ["M"], pooling="none")[0].vectors[-1].shape == (1, 32)
    assert predict_contacts(model, ["M"])[0].shape == (1, 1)
    assert score_sequences(model, ["M"])[0].num_tokens == 1
    assert pseudo_perplexity(model, ["M"])[0] >= 1


def test_nothing_but_masks():
    model = tiny_esm2()
    (result,) = embed_sequences(model, ["<mask>" * 5], pooling="none")
    assert result.num_tokens == 5
    assert np.isfinite(result.vectors[-1]).all()
    with pytest.raises(SequenceError, match="sequence 0: <mask> at position 1 has no residue to score"):
        score_sequences(model, ["<mask>" * 5])


def test_a_mask_is_one_residue_wherever_residues_are_counted(caplog: pytest.LogCaptureFixture):
    model = tiny_esm2(max_position_embeddings=14)
    assert embed_sequences(model, ["<mask>" * 10])[0].num_tokens == 10
    predict_contacts(model, ["<mask>" * 10])
    assert not caplog.records
    predict_contacts(model, ["<mask>" * 11])
    assert "a sequence of 11 residues, but was trained on 10" in caplog.text


def test_the_longest_known_protein_has_variants_in_its_middle_and_at_its_end():
    model = tiny_esm2(num_hidden_layers=1, max_position_embeddings=132)
    titin = "MKTAYIAKQR" * 3500
    found = score_variants(model, ["M17501A", "R35000K"], titin)["score"].to_pylist()
    middle = score_variants(model, ["M65A"], titin[17500 - 64 : 17500 + 64])["score"].to_pylist()
    end = score_variants(model, ["R128K"], titin[-128:])["score"].to_pylist()
    assert found == pytest.approx([*middle, *end], abs=1e-5)


def test_the_longest_known_protein_is_read_to_its_end():
    """Titin has about 35,000 residues; its end is that of its last window."""
    model = tiny_esm2(num_hidden_layers=1, max_position_embeddings=132)
    titin = "MKTAYIAKQR" * 3500
    whole, end = embed_sequences(model, [titin, titin[-128:]], pooling="last")
    assert whole.num_tokens == 35_000
    np.testing.assert_allclose(whole.vectors[-1], end.vectors[-1], atol=1e-5)
