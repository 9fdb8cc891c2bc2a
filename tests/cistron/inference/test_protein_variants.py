from __future__ import annotations

import pytest

from cistron.errors import InputError
from cistron.inference.protein_variants import (
    Substitution,
    VariantProblem,
    find_substitutions,
    mutated,
    parse_variant,
)

WILD_TYPE = "MKTAYIAKQRUX"
K2A, A4T = Substitution("K", 1, "A"), Substitution("A", 3, "T")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("K2A", [K2A]),
        ("p.K2A", [K2A]),
        ("p.Lys2Ala", [K2A]),
        ("Lys2Ala", [K2A]),
        ("p.(Lys2Ala)", [K2A]),
        ("K2A:A4T", [K2A, A4T]),
        ("A4T:K2A", [A4T, K2A]),
        ("p.K2A:p.Ala4Thr", [K2A, A4T]),
        ("p.[Lys2Ala;Ala4Thr]", [K2A, A4T]),
        ("Sec11Cys", [Substitution("U", 10, "C")]),
        ("X12A", [Substitution("X", 11, "A")]),
        ("K2X", [Substitution("K", 1, "X")]),
        ("K2K", []),
        ("p.Lys2=", []),
        ("K2=:A4T", [A4T]),
        ("p.=", []),
        ("p.(=)", []),
        ("k2a", [K2A]),
        ("p.k2A", [K2A]),
        ("p.lys2ala", [K2A]),
        ("LYS2ALA", [K2A]),
        ("k2a:p.ala4thr", [K2A, A4T]),
        ("sec11c", [Substitution("U", 10, "C")]),
        ("k2=", []),
    ],
)
def test_every_way_to_write_a_variant(variant: str, expected: list[Substitution]):
    assert parse_variant(variant, WILD_TYPE, name="variant 0") == expected


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("K2*", "K2[*] has a stop, for which ESM-2 has no token"),
        ("p.Lys2Ter", "Lys2Ter has a stop"),
        ("*13K", "has a stop"),
        ("p.Lys2fs", "Lys2fs is no substitution; only replaced residues can be scored"),
        ("p.Lys2del", "no substitution"),
        ("p.Lys2_Thr3insGly", "no substitution"),
        ("K0A", "K0A is before the beginning; positions count from 1"),
        ("K13A", "K13A is past the end, at 12 residues"),
        ("K999999999A", "past the end"),
        ("K" + "9" * 5000 + "A", "cannot read"),
        ("p.Ala2Lys", "the wild type has K at 2, not A"),
        ("K3A", "the wild type has T at 3, not K"),
        ("K2A:Lys2Gly", "replaces position 2 twice"),
        ("K2A:K2=", "replaces position 2 twice"),
        ("k2", "cannot read 'k2'; write it as 'A23T' or 'p.Ala23Thr'"),
        ("t2a", "the wild type has K at 2, not T"),
        ("p.lys2ter", "lys2ter has a stop"),
        ("\N{KELVIN SIGN}2A", "cannot read"),
        ("K02A", "cannot read 'K02A'"),
        ("K-2A", "cannot read"),
        ("K2J", r"cannot read 'K2J': 'J' is no residue \(allowed: ACDEFGHIKLMNPQRSTVWYXBUZO\)"),
        ("j2A", "cannot read 'j2A': 'j' is no residue"),
        ("K2-", "cannot read 'K2-': '-' is no residue"),
        ("K2ALA3", "cannot read 'K2ALA3'; write it as"),
        ("K2", "cannot read 'K2'"),
        ("", "cannot read ''"),
        ("K2A:", "cannot read ''"),
        ("K2A A4T", "cannot read 'K2A A4T'"),
        ("NP_000537.3:p.Lys2Ala", "cannot read 'NP_000537.3'"),
        ("K２A", "cannot read"),
        (23, "must be a string such as 'A23T' or 'A23T:G45D', got 23"),
    ],
)
def test_a_variant_that_cannot_be_scored_says_why(variant: object, message: str):
    with pytest.raises(InputError, match=f"^variant 7.*: .*{message}"):
        parse_variant(variant, WILD_TYPE, name="variant 7")


@pytest.mark.parametrize(
    ("variant", "status"),
    [
        ("p.Lys2fs", "not_a_substitution"),
        ("K2*", "not_a_substitution"),
        ("K0A", "outside_protein"),
        ("A4T:K13A", "outside_protein"),
        ("K3A", "wild_type_mismatch"),
        ("K2A:K2G", "repeated_position"),
        ("K2J", "malformed"),
        (None, "malformed"),
    ],
)
def test_a_problem_has_a_status(variant: object, status: str):
    found = find_substitutions(variant, WILD_TYPE)
    assert isinstance(found, VariantProblem)
    assert found.status == status


def test_replaced_residues():
    assert mutated(WILD_TYPE, [A4T, K2A]) == "MATTYIAKQRUX"
    assert mutated(WILD_TYPE, []) == WILD_TYPE
