"""The letters of DNA and protein: codes, complements and the checks at the door.

All magic letters of Cistron live here. Validation names the record, the 1-based position and the letter, because a
refused sequence must be findable in a file of a million others.
"""

from __future__ import annotations

import re
from typing import Final

from cistron.errors import SequenceError

NUCLEOTIDES: Final = "ACGT"
"""The four bases; what Evo 2 generates unless asked otherwise."""

IUPAC_NUCLEOTIDES: Final = "ACGTNRYSWKMBDHV"
"""Bases, N, and the IUPAC ambiguity codes (Cornish-Bowden 1985, doi:10.1093/nar/13.9.3021)."""

SPLICE_JOIN: Final = "@"
CONTIG_SPLIT: Final = "#"
TAG_DELIMITER: Final = "|"
"""Control characters of Evo 2's corpus: exon join, contig split, and the delimiter of a phylogenetic tag."""

STANDARD_AMINO_ACIDS: Final = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 residues coded by the standard genetic code."""

AMINO_ACIDS: Final = STANDARD_AMINO_ACIDS + "XBUZO"
"""Standard residues plus unknown, Asx, selenocysteine, Glx and pyrrolysine: every residue ESM-2 has a token for."""

GAPS: Final = ".-"
"""Alignment gaps: ESM-2 has tokens for them, so it can read a row of an alignment; a training corpus holds none."""

MASK: Final = "<mask>"

_SHORTEST_DNA: Final = 30
"""Letters from which a sequence of nothing but nucleotides is no protein."""

_SHORTEST_MIXED_DNA: Final = 100
_NUCLEOTIDE_SHARE: Final = 0.95
_RAREST_BASE_SHARE: Final = 0.02
"""Letters from which one that also holds a few ambiguity codes is none either, the share of A, C, G, T, U and N in it,
and the share that each of the four bases has at least. Of the 26,000 proteins of that length in our samples of UniProt
and UniRef90 the richest in these letters, half of it glycine, has a share of 0.81."""

_COMPLEMENT: Final = str.maketrans("ACGTNRYSWKMBDHVacgtnryswkmbdhv", "TGCANYRSWMKVHDBtgcanyrswmkvhdb")
_DNA: Final = re.compile(rf"(?:[{IUPAC_NUCLEOTIDES}{IUPAC_NUCLEOTIDES.lower()}@#]+|\|[ -{{}}~]*(?:\||\Z))*")
_PROTEIN: Final = re.compile(rf"(?:[{AMINO_ACIDS}{AMINO_ACIDS.lower()}]|{MASK})*")
_GAPPED_PROTEIN: Final = re.compile(rf"(?:[{AMINO_ACIDS}{AMINO_ACIDS.lower()}{GAPS}]|{MASK})*")


def reverse_complement(sequence: str) -> str:
    """Return the reverse complement; case is kept and ambiguity codes are complemented.

    >>> reverse_complement("AACGTRn")
    'nYACGTT'
    """
    return sequence[::-1].translate(_COMPLEMENT)


def num_residues(sequence: str) -> int:
    """Return the length of a protein, in which ``<mask>`` is one residue.

    >>> num_residues("MK<mask>T")
    4
    """
    return len(sequence) - (len(MASK) - 1) * sequence.count(MASK)


def validate_dna(sequence: str, *, name: str = "sequence", max_length: int | None = None, offset: int = 0) -> str:
    """Return `sequence` unchanged when Evo 2 can read it.

    Allowed are A C G T N, the IUPAC codes, lower case (kept), ``@``, ``#``, and tags between two ``|``, whose inside is
    any printable ASCII text. `offset` is the number of letters before this part of a longer record.

    Raises:
        SequenceError: empty, longer than `max_length`, or a letter outside the alphabet; names letter and position.
    """
    _check_length(len(sequence), name=name, max_length=max_length, unit="nt")
    end = _match_end(_DNA, sequence)
    if end == len(sequence):
        return sequence
    letter = sequence[end]
    hint = ""
    if letter in "Uu":
        hint = "; this looks like RNA: write T for U"
    elif letter.upper() in AMINO_ACIDS:
        hint = "; this looks like a protein, and the model reads DNA"
    raise SequenceError(
        f"{name}: letter {letter!r} at position {offset + end + 1} is not in the DNA alphabet "
        f"({IUPAC_NUCLEOTIDES}, lower case, '@', '#', tags between '|'){hint}"
    )


def validate_protein(
    sequence: str, *, name: str = "sequence", max_length: int | None = None, gaps: bool = False
) -> str:
    """Return `sequence` in upper case when ESM-2 has a token for each residue; ``<mask>`` may stand for a residue.

    With `gaps`, ``.`` and ``-`` are read too.

    Raises:
        SequenceError: empty, longer than `max_length` residues, or a letter outside the alphabet.
    """
    _check_length(num_residues(sequence), name=name, max_length=max_length, unit="residues")
    end = _match_end(_GAPPED_PROTEIN if gaps else _PROTEIN, sequence)
    if end < len(sequence):
        letter = sequence[end]
        raise SequenceError(
            f"{name}: letter {letter!r} at position {end + 1} is not in the protein alphabet "
            f"({AMINO_ACIDS}{GAPS if gaps else ''}, lower case, {MASK}){_protein_hint(letter)}"
        )
    return MASK.join(part.upper() for part in sequence.split(MASK))


def refuse_dna(residues: str, *, name: str = "sequence") -> None:
    """Raise ``SequenceError`` when upper-case residues are nucleotides, whose letters all are residues too.

    That is at least 30 letters of A, C, G, T, U and N only, with A, C, G and one of T and U among them: by chance such
    a protein is rarer than 1 in 10^17, and low-complexity ones lack cysteine. In a long record a few other letters, as
    IUPAC codes are, do not change what it is.
    """
    length = len(residues)
    a, c, g, t, n = (sum(map(residues.count, letters)) for letters in ("A", "C", "G", "TU", "N"))
    nucleotides, rarest = a + c + g + t + n, min(a, c, g, t)
    is_pure = length >= _SHORTEST_DNA and nucleotides == length and rarest > 0
    is_mixed = nucleotides >= _NUCLEOTIDE_SHARE * length and rarest >= _RAREST_BASE_SHARE * length
    if is_pure or (length >= _SHORTEST_MIXED_DNA and is_mixed):
        raise SequenceError(
            f"{name}: this looks like DNA, and the model reads proteins: translate it first ({nucleotides:,} of its "
            f"{length:,} letters are A, C, G, T, U or N)"
        )


def _protein_hint(letter: str) -> str:
    if letter.isspace():
        return "; remove white space"
    if letter.isdigit():
        return "; remove position numbers"
    hints = {"*": "; remove the stop", "-": "; remove alignment gaps", ".": "; remove alignment gaps"}
    return "; write X for J (Leu or Ile)" if letter in "Jj" else hints.get(letter, "")


def _check_length(length: int, *, name: str, max_length: int | None, unit: str) -> None:
    if not length:
        raise SequenceError(f"{name}: the sequence is empty")
    if max_length is not None and length > max_length:
        raise SequenceError(f"{name}: {length:,} {unit} is longer than the limit of {max_length:,}")


def _match_end(pattern: re.Pattern[str], sequence: str) -> int:
    match = pattern.match(sequence)
    assert match is not None, "a starred pattern matches at least the empty string"
    return match.end()
