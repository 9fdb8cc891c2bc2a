from __future__ import annotations

from importlib.resources import files

import pytest

from cistron.alphabets import (
    AMINO_ACIDS,
    IUPAC_NUCLEOTIDES,
    refuse_dna,
    reverse_complement,
    validate_dna,
    validate_protein,
)
from cistron.errors import SequenceError
from cistron.io.fasta import read_fasta


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


@pytest.mark.parametrize("code", [*"RYSWKMBDHV", "RY", "N"])
def test_ambiguity_codes_hide_no_long_dna(code: str):
    long = "ACGTTGCAAT" * 12
    with pytest.raises(SequenceError, match="record 7: this looks like DNA, and the model reads proteins"):
        refuse_dna(long[:60] + code + long[60:], name="record 7")
    refuse_dna("ACGTTGCAGT" + "RYL" + "ACGTTGCAGTACGTAACC")
    refuse_dna(long[:95] + "L" * 6)
    refuse_dna("GAGAGT" * 40 + "C" + "S")


def test_no_real_protein_is_taken_for_dna():
    proteins = list(read_fasta(str(files("cistron_jobs") / "sample_data" / "uniprot_2k.fasta.gz")))
    assert len(proteins) == 2000
    for protein in proteins:
        refuse_dna(protein.sequence, name=protein.name)
