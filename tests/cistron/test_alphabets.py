from __future__ import annotations

import pytest

from cistron.alphabets import AMINO_ACIDS, IUPAC_NUCLEOTIDES, reverse_complement, validate_dna, validate_protein
from cistron.errors import SequenceError


def test_reverse_complement_is_its_own_inverse_for_every_code():
    letters = IUPAC_NUCLEOTIDES + IUPAC_NUCLEOTIDES.lower()
    assert reverse_complement(reverse_complement(letters)) == letters
    bases = {
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
        "B": "CGT",
        "D": "AGT",
        "H": "ACT",
        "V": "ACG",
    }
    for code, meaning in bases.items():
        assert set(bases[reverse_complement(code)]) == set(reverse_complement(meaning))


@pytest.mark.parametrize(
    "sequence", ["ACGTN", "acgtn", IUPAC_NUCLEOTIDES, "AC@GT#A", "|d__BACTERIA;p__;s__E COLI|ACGT", "|d__"]
)
def test_dna_alphabet_accepts_what_evo2_reads(sequence: str):
    assert validate_dna(sequence) == sequence


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "empty"),
        ("ACGUA", r"'U' at position 4 .*RNA"),
        ("MKTAYIAKQ", r"'I' at position 6 .*protein"),
        ("ACG TA", r"' ' at position 4"),
        ("ACGT-", r"'-' at position 5"),
        ("ACG\nT", r"position 4"),
        ("ACÇT", r"'Ç' at position 3"),
        ("|d__\x00|A", r"position 1"),
    ],
)
def test_dna_faults_name_letter_and_position(sequence: str, message: str):
    with pytest.raises(SequenceError, match=message):
        validate_dna(sequence, name="chr1")


def test_errors_name_the_record_and_the_limit():
    with pytest.raises(SequenceError, match=r"chr1: 5 nt is longer than the limit of 4"):
        validate_dna("ACGTA", name="chr1", max_length=4)
    with pytest.raises(SequenceError, match=r"p1: 5 residues is longer than the limit of 4"):
        validate_protein("MKTAY", name="p1", max_length=4)


def test_protein_is_upper_cased_and_masks_count_as_one_residue():
    assert validate_protein("mkt<mask>a", max_length=5) == "MKT<mask>A"
    assert validate_protein(AMINO_ACIDS) == AMINO_ACIDS
    assert validate_protein("a<mask>.-", gaps=True, max_length=4) == "A<mask>.-"


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("", "empty"),
        ("MKT*", "remove the stop"),
        ("MK-T", "gaps"),
        ("MJ", "X for J"),
        ("M1", "'1' at position 2"),
        ("M K", "' '"),
    ],
)
def test_protein_faults_say_what_to_do(sequence: str, message: str):
    with pytest.raises(SequenceError, match=message):
        validate_protein(sequence)


def test_validation_is_linear_on_long_input():
    validate_dna("ACGT" * 500_000 + "|d__X|")
    with pytest.raises(SequenceError, match="position 2000001"):
        validate_dna("ACGT" * 500_000 + "!")
