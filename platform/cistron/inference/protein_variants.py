"""Protein variants as people write them: ``A23T``, ``A23T:G45D``, ``p.Ala23Thr``, ``p.[Ala23Thr;Gly45Asp]``.

Positions count from 1. Only replaced residues can be scored: a stop, an insertion, a deletion or a frame shift changes
what follows, and says so when it is refused. A synonymous variant (``A23A``, ``p.Ala23=``, ``p.=``) is one without
effect. ``X`` is the unknown residue; as the stop of older nomenclature it is not read. Residues may be in lower case,
as they may in a sequence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from cistron.alphabets import AMINO_ACIDS
from cistron.errors import InputError

THREE_LETTERS: Final = {
    "Ala": "A",
    "Cys": "C",
    "Asp": "D",
    "Glu": "E",
    "Phe": "F",
    "Gly": "G",
    "His": "H",
    "Ile": "I",
    "Lys": "K",
    "Leu": "L",
    "Met": "M",
    "Asn": "N",
    "Pro": "P",
    "Gln": "Q",
    "Arg": "R",
    "Ser": "S",
    "Thr": "T",
    "Val": "V",
    "Trp": "W",
    "Tyr": "Y",
    "Xaa": "X",
    "Asx": "B",
    "Sec": "U",
    "Glx": "Z",
    "Pyl": "O",
}
"""Three-letter codes of the residues (IUPAC-IUB 1984) and their letters."""

_RESIDUE: Final = rf"[{AMINO_ACIDS}]|{'|'.join(THREE_LETTERS)}"
# Without ASCII, ignoring the case reads the long s as S and the Kelvin sign as K.
_ANY_CASE: Final = re.IGNORECASE | re.ASCII
_SUBSTITUTION: Final = re.compile(rf"({_RESIDUE})(0|[1-9][0-9]{{0,8}})({_RESIDUE}|=)", _ANY_CASE)
_STOP: Final = re.compile(rf"(?:(?:{_RESIDUE})[0-9]+)(?:\*|Ter)|(?:\*|Ter)[0-9]+.*", _ANY_CASE)
_ANY_LETTERS: Final = re.compile(r"(\D)[0-9]+(\D)")
_OTHER_CHANGE: Final = re.compile(r"fs|del|ins|dup|ext")


@dataclass(frozen=True, slots=True)
class Substitution:
    """One replaced residue; `position` is 0-based."""

    wild_type: str
    position: int
    mutant: str


ProteinStatus: TypeAlias = Literal[
    "malformed", "not_a_substitution", "outside_protein", "wild_type_mismatch", "repeated_position"
]
"""Why a variant has no score.

malformed: it cannot be read. not_a_substitution: a stop, an insertion, a deletion, a frame shift. outside_protein:
position 0, or beyond the end. wild_type_mismatch: the protein has another residue there. repeated_position: one
position twice.
"""


@dataclass(frozen=True, slots=True)
class VariantProblem:
    """Why a variant cannot be scored."""

    status: ProteinStatus
    message: str


def find_substitutions(variant: Any, wild_type: str) -> list[Substitution] | VariantProblem:
    """Read one variant and compare it with the wild type; a synonymous one has no substitutions."""
    if not isinstance(variant, str):
        return VariantProblem("malformed", f"must be a string such as 'A23T' or 'A23T:G45D', got {variant!r}")
    substitutions: dict[int, Substitution] = {}
    for word in _words(variant):
        found = _substitution(word, wild_type)
        if isinstance(found, VariantProblem):
            return found
        if found.position in substitutions:
            return VariantProblem("repeated_position", f"replaces position {found.position + 1} twice")
        substitutions[found.position] = found
    return [found for found in substitutions.values() if found.mutant != found.wild_type]


def parse_variant(variant: Any, wild_type: str, *, name: str) -> list[Substitution]:
    """Return what :func:`find_substitutions` finds.

    Raises:
        InputError: the variant cannot be scored; begins with `name`.
    """
    found = find_substitutions(variant, wild_type)
    if isinstance(found, VariantProblem):
        place = f"{name} ({variant!r})" if isinstance(variant, str) else name
        raise InputError(f"{place}: {found.message}")
    return found


def mutated(wild_type: str, substitutions: list[Substitution]) -> str:
    """Return the protein with the residues replaced."""
    residues = list(wild_type)
    for substitution in substitutions:
        residues[substitution.position] = substitution.mutant
    return "".join(residues)


def _words(variant: str) -> list[str]:
    """Return the single changes of a variant; none for ``p.=``, which says that the protein is unchanged."""
    words = []
    for part in variant.split(":"):
        text = part.removeprefix("p.")
        for opening, closing in ("[]", "()"):
            if text.startswith(opening) and text.endswith(closing):
                text = text[1:-1]
        words += text.split(";")
    return [] if words == ["="] else words


def _substitution(word: str, wild_type: str) -> Substitution | VariantProblem:
    match = _SUBSTITUTION.fullmatch(word)
    if match is None:
        return _unreadable(word)
    expected, number, mutant = match.groups()
    expected = _letter(expected)
    position = int(number) - 1
    if position < 0:
        return VariantProblem("outside_protein", f"{word} is before the beginning; positions count from 1")
    if position >= len(wild_type):
        return VariantProblem("outside_protein", f"{word} is past the end, at {len(wild_type)} residues")
    if (found := wild_type[position]) != expected:
        return VariantProblem("wild_type_mismatch", f"the wild type has {found} at {number}, not {expected}")
    return Substitution(expected, position, expected if mutant == "=" else _letter(mutant))


def _letter(code: str) -> str:
    """Return the letter of a residue, of one or three letters in any case."""
    return THREE_LETTERS.get(code.capitalize(), code.upper())


def _unreadable(word: str) -> VariantProblem:
    """Say why a word is no substitution."""
    if _STOP.fullmatch(word):
        reason = "has a stop, for which ESM-2 has no token; only replaced residues can be scored"
        return VariantProblem("not_a_substitution", f"{word} {reason}")
    if _OTHER_CHANGE.search(word):
        return VariantProblem("not_a_substitution", f"{word} is no substitution; only replaced residues can be scored")
    letters = _ANY_LETTERS.fullmatch(word)
    if letters and (unknown := [letter for letter in letters.groups() if letter.upper() not in AMINO_ACIDS]):
        reason = f"{unknown[0]!r} is no residue (allowed: {AMINO_ACIDS})"
        return VariantProblem("malformed", f"cannot read {word!r}: {reason}")
    return VariantProblem("malformed", f"cannot read {word!r}; write it as 'A23T' or 'p.Ala23Thr'")
