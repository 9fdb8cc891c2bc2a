from __future__ import annotations

import random

import pytest
from tests.tiny_models import tiny_evo2

from cistron.errors import InputError
from cistron.inference.variant_report import SCORED, report_variants
from cistron.inference.variants import Variant, score_variants
from cistron.inference.windows import Problem, Window, find_window
from cistron.io.reference import open_reference

CHR1 = "".join(random.Random(3).choices("ACGT", k=80))
GENOME = {
    "chr1": CHR1[:40] + CHR1[40:60].lower() + CHR1[60:],
    "chr2": "ACGTRYACGTNNNNNNNNNNACGT",
    "odd": "ACGTACGT-ACGTACGT",
    "chr7:1001-1040": "ACGT" * 10,
}


def base(pos: int, shift: int = 0) -> str:
    return "ACGT"[("ACGT".index(CHR1[pos - 1]) + shift) % 4]


@pytest.mark.parametrize(
    ("variant", "status", "detail"),
    [
        (("chr1", 30, base(30), base(30, 1)), SCORED, None),
        (("1", 30, base(30), base(30, 1)), SCORED, None),
        (("NC_000001.11", 30, base(30), base(30, 1)), SCORED, None),
        (("chr1", 50, base(50).lower(), base(50, 1).lower()), SCORED, None),
        (("chr1", 30, base(30), base(30)), SCORED, None),
        (("chr1", 30, base(30, 1), base(30, 2)), "ref_mismatch", f"the reference has '{base(30)}' there"),
        (
            ("chr1", 31, CHR1[30:33] + base(34, 1), "C"),
            "ref_mismatch",
            f"chr1:31 {CHR1[30:33]}{base(34, 1)}>C: the reference has '{CHR1[30:34]}' there, not "
            f"'{CHR1[30:33]}{base(34, 1)}'; the first difference is {base(34)} instead of {base(34, 1)} at 34",
        ),
        (("chr1", 0, "A", "C"), "outside_contig", "outside chr1, which has 80 letters"),
        (("chr1", 81, "A", "C"), "outside_contig", "outside chr1"),
        (("chr1", 80, base(80) + "A", "C"), "outside_contig", "outside chr1"),
        (("chr9", 1, "A", "C"), "unknown_contig", "no sequence named 'chr9'; did you mean 'chr"),
        (("chr1", 30, base(30), "."), "no_alt", "no alternative allele"),
        (("chr1", 30, base(30), "<DEL>"), "symbolic_allele", "'<DEL>' is no sequence"),
        (("chr1", 30, base(30), "*"), "symbolic_allele", "no sequence"),
        (("chr1", 30, base(30), f"{base(30)}[chr2:5["), "symbolic_allele", "no sequence"),
        (("chr1", 30, base(30), "R"), "invalid_allele", "alt must be letters of ACGTN, got 'R'"),
        (("chr1", 30, "", "A"), "invalid_allele", "ref must be letters"),
        (
            ("chr1", 30, CHR1[29:70], "A"),
            "allele_too_long",
            "chr1:30 " + CHR1[29:69] + "... (41 letters)>A: alleles do not fit a window of 16",
        ),
        (("chr2", 5, "A", "G"), SCORED, None),  # VCF reduces R to A.
        (("chr2", 5, "G", "A"), "ref_mismatch", "the reference has 'R' there"),
        (("chr2", 16, "N", "A"), "ambiguous_window", "of 16 letters around it are none of A, C, G and T"),
        (("odd", 6, "C", "A"), "invalid_window", "'-' at 9, which is no nucleotide code"),
        (("chr7", 1020, "T", "A"), SCORED, None),
        (("chr7", 1004, "T", "A"), "outside_reference", "needs 996 to 1,011, but the reference holds 1,001 to 1,040"),
        (("chr7", 5000, "T", "A"), "outside_reference", "the reference holds 1,001 to 1,040 only"),
    ],
)
def test_what_becomes_of_a_variant(variant: tuple[str, int, str, str], status: str, detail: str | None):
    genome = open_reference(GENOME)
    [row] = report_variants(tiny_evo2(), [Variant(*variant)], genome, window=16).to_pylist()
    assert (row["chrom"], row["pos"], row["ref"], row["alt"]) == variant
    assert row["status"] == status
    assert (row["score"] is None) == (row["ref_score"] is None) == (row["mean_score"] is None) == (status != SCORED)
    assert (detail is None and row["detail"] is None) or detail in row["detail"]


def test_bad_variants_do_not_touch_good_ones():
    good = [("chr1", pos, base(pos), base(pos, 1)) for pos in (10, 60, 10)]
    bad = [("chr1", 30, base(30), "*"), ("chr1", 30, base(30, 1), "A")]
    genome = open_reference(GENOME)
    rows = report_variants(
        tiny_evo2(), [Variant(*v) for v in (good[0], bad[0], good[1], bad[1], good[2])], genome, window=32
    ).to_pylist()
    expected = score_variants(tiny_evo2(), good, GENOME, window=32).to_pylist()
    scored = [rows[0], rows[2], rows[4]]
    for got, want in zip(scored, expected, strict=True):
        assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-5)
        assert got["mean_score"] == pytest.approx(got["score"] / (got["window_letters"] - 1))
    assert [row["window_letters"] for row in scored] == [25, 32, 25]


def test_ambiguous_letters_are_counted_and_the_limit_is_a_setting():
    genome, variant = open_reference(GENOME), [Variant("chr2", 16, "N", "A")]
    [row] = report_variants(tiny_evo2(), variant, genome, window=16, max_ambiguous=1.0).to_pylist()
    assert (row["status"], row["window_letters"], row["ambiguous_letters"]) == (SCORED, 16, 10)


def test_a_region_keeps_the_positions_of_its_chromosome():
    found = find_window(Variant("7", 1020, "T", "G"), open_reference(GENOME), window=8)
    assert isinstance(found, Window)
    # 1020 is the 20th letter of the record.
    assert found.reference == ("ACGT" * 10)[15:23]
    assert found.alternative == ("ACGT" * 10)[15:19] + "G" + ("ACGT" * 10)[20:23]


def test_an_ambiguous_contig_name_is_no_guess():
    genome = open_reference({"chr1": "ACGT", "1": "ACGA", "NC_000001.11": "TTTT", "NC_000002.12": "ACGT", "2": "A"})
    assert genome.contig("1").name == "1"
    found = find_window(Variant("chr2", 1, "A", "C"), genome, window=4)
    assert isinstance(found, Problem)
    assert "'chr2' may mean any of 'NC_000002.12', '2'" in found.message
    with pytest.raises(InputError, match="may mean any of"):
        genome.contig("NC_000001.10")
