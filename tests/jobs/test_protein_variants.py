from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.tiny_models import tiny_esm2, tiny_evo2

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import CistronError, ConfigError, InputError, SequenceError
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs import protein_variants
from cistron_jobs.protein_variant_parts import ProteinVariantsConfig, range_parts, variant_parts
from cistron_jobs.protein_variants import run

PROTEINS = {"a": "MKTAYIAKQR", "b": "GSVMKTAYIAKQRQISFVKS", "c": "MEEPQSD"}
VARIANTS = [
    ("b", "S2T"),
    ("a", "A4T:K8R"),
    ("a", "p.Ala4Gly"),
    ("a", "M1V"),
    ("b", "p.[Ser2Thr;Val3Leu]"),
    ("b", "G1="),
    ("c", "D7E"),
]
BAD = [("c", "D7*"), ("c", "M0V"), ("c", "E8K"), ("c", "E1K"), ("d", "M1V"), ("c", "J1A")]
STATUSES = [
    "not_a_substitution",
    "outside_protein",
    "outside_protein",
    "wild_type_mismatch",
    "unknown_protein",
    "malformed",
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_esm2(), tmp_path / "esm2")
    (tmp_path / "wt.faa").write_text("".join(f">{name} x\n{residues.lower()}\n" for name, residues in PROTEINS.items()))
    write_table(tmp_path / "v.tsv", VARIANTS)
    return tmp_path


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("variant\tother\tprotein\n" + "".join(f"{variant}\t1\t{protein}\n" for protein, variant in rows))


def config(files: Path, *words: str) -> ProteinVariantsConfig:
    given = {
        "model": str(files / "esm2"),
        "input": str(files / "v.tsv"),
        "reference": str(files / "wt.faa"),
        "output": str(files / "out.parquet"),
        "actors": "0",
    }
    given.update(word.split("=", 1) for word in words)  # type: ignore[misc]
    return resolve(ProteinVariantsConfig, parse_overrides(f"{name}={value}" for name, value in given.items()))


def rows(files: Path) -> list[dict[str, Any]]:
    return pq.read_table(files / "out.parquet").to_pylist()


def expected_scores(strategy: Any, variants: list[tuple[str, str]] = VARIANTS, **options: Any) -> list[float]:
    model = tiny_esm2()
    return [
        cistron.score_variants(model, [variant], PROTEINS[protein], strategy=strategy, **options)["score"][0].as_py()
        for protein, variant in variants
    ]


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal", "pseudo-ppl"])
@pytest.mark.parametrize("words", [(), ("records_per_part=2",), ("letters_per_part=1", "window=8", "token_budget=30")])
def test_scores_are_those_of_the_function_in_the_order_of_the_table(files: Path, strategy: str, words: Any):
    run(config(files, f"strategy={strategy}", *words))
    found = rows(files)
    assert [(row["record"], row["protein"], row["variant"]) for row in found] == [
        (record, *variant) for record, variant in enumerate(VARIANTS)
    ]
    window = 8 if "window=8" in words else None
    assert [row["score"] for row in found] == pytest.approx(expected_scores(strategy, window=window), abs=1e-5)
    assert {row["status"] for row in found} == {"scored"}
    assert found[5]["score"] == 0


def test_what_cannot_be_scored_is_told(files: Path, caplog: pytest.LogCaptureFixture):
    write_table(files / "v.tsv", [*BAD, *VARIANTS])
    with caplog.at_level("WARNING"):
        run(config(files))
    found = rows(files)
    assert [row["status"] for row in found] == [*STATUSES, *["scored"] * len(VARIANTS)]
    assert all(row["score"] is None for row in found[: len(BAD)])
    assert found[3]["detail"] == "the wild type has M at 1, not E"
    assert "7 of 13 variants scored" in caplog.text
    assert "1 wild_type_mismatch, the first: c E1K: the wild type has M at 1, not E" in caplog.text


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal", "pseudo-ppl"])
def test_an_empty_cell_is_a_variant_that_cannot_be_read(files: Path, caplog: pytest.LogCaptureFixture, strategy: str):
    write_table(files / "v.tsv", [("a", "A4T"), ("b", ""), ("a", "k8r"), ("d", "")])
    run(config(files, f"strategy={strategy}"))
    found = rows(files)
    assert [row["status"] for row in found] == ["scored", "malformed", "scored", "unknown_protein"]
    assert [row["variant"] for row in found] == ["A4T", None, "k8r", None]
    assert found[1]["detail"] == "the cell is empty; write a variant as 'A23T' or 'p.Ala23Thr'"
    assert "malformed, the first: b (empty): the cell is empty" in caplog.text
    assert found[2]["score"] == pytest.approx(expected_scores(strategy, [("a", "K8R")])[0], abs=1e-5)
    with pytest.raises(
        InputError, match=r"v.tsv, row 2 \(b ''\): the cell is empty; .* \(malformed; on_mismatch=report"
    ):
        run(config(files, f"strategy={strategy}", "on_mismatch=error"))


def test_an_unknown_strategy_is_one_fault_with_one_list(files: Path):
    with pytest.raises(ConfigError) as caught:
        config(files, "strategy=wt-marginals")
    assert str(caught.value) == (
        "strategy: Input should be 'masked-marginal', 'wt-marginal' or 'pseudo-ppl' (got 'wt-marginals')"
    )


def test_a_run_goes_on_where_it_was_killed(files: Path, monkeypatch: pytest.MonkeyPatch):
    words = ("records_per_part=2",)
    run(config(files, *words))
    whole = (files / "out.parquet").read_bytes()
    (files / "out.parquet").unlink()
    scored = protein_variants._scores
    calls: list[int] = []

    def killed_in_the_third(model: Any, part: pa.Table, **options: Any) -> pa.Table:
        calls.append(part.num_rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(model, part, **options)

    monkeypatch.setattr(protein_variants, "_scores", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(config(files, *words))
    assert not (files / "out.parquet").exists()
    run(config(files, *words))
    assert len(calls) == 3 + 2, "two of the four parts were finished before"
    assert (files / "out.parquet").read_bytes() == whole


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
@pytest.mark.parametrize("letters", [1, 50, 10_000])
def test_the_matrix_of_every_protein(files: Path, strategy: Any, letters: int):
    run(config(files, "input=null", f"strategy={strategy}", f"letters_per_part={letters}"))
    table = pq.read_table(files / "out.parquet")
    assert table.column_names == ["protein", "position", "wild_type", *cistron.RESIDUE_ORDER]
    found = table.to_pylist()
    assert [(row["protein"], row["position"], row["wild_type"]) for row in found] == [
        (name, position + 1, residue)
        for name, residues in PROTEINS.items()
        for position, residue in enumerate(residues)
    ]
    want = np.concatenate(
        [cistron.substitution_matrix(tiny_esm2(), residues, strategy=strategy) for residues in PROTEINS.values()]
    )
    got = np.array([[row[residue] for residue in cistron.RESIDUE_ORDER] for row in found])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_parts_share_passes_and_stay_small(files: Path):
    """Positions 4 and 8 of a 10-residue protein are two passes of 10 residues, however many variants look at them."""
    write_table(files / "v.tsv", [("a", variant) for variant in ("A4T", "A4G", "A4T:K8R", "K8R", "M1V", "M1L")])
    assert [len(part) for part in variant_parts(config(files, "letters_per_part=20"))] == [4, 2]
    assert [len(part) for part in variant_parts(config(files, "letters_per_part=20", "strategy=wt-marginal"))] == [6]
    ranges = [part.select(["start", "stop"]).to_pylist() for part in range_parts(config(files, "letters_per_part=100"))]
    assert ranges[0] == [{"start": 0, "stop": 10}]
    assert [sum(row["stop"] - row["start"] for row in part) for part in ranges] == [10, 5, 5, 5, 5, 7]


def test_one_protein_needs_no_column_and_a_table_of_assays_is_read(files: Path):
    (files / "wt.faa").write_text(f">sp|P1|A_X\n{PROTEINS['a']}\n")
    (files / "dms.csv.gz").write_bytes(gzip.compress(b"mutant,DMS_score\nA4T,0.1\nA4T:K8R,NA\n"))
    run(config(files, f"input={files / 'dms.csv.gz'}"))
    assert [row["protein"] for row in rows(files)] == ["sp|P1|A_X"] * 2
    want = expected_scores("masked-marginal", [("a", "A4T"), ("a", "A4T:K8R")])
    assert [row["score"] for row in rows(files)] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("on_mismatch=error",), InputError, r"v.tsv, row 8 \(c 'E1K'\): the wild type has M at 1, not E \(wild_type_"),
        (("strategy=pseudo-ppl", "input=null"), ConfigError, "strategy=pseudo-ppl scores the variants of a table"),
        (("strategy=delta",), ConfigError, "strategy"),
        (("window=0",), ConfigError, "window"),
        (("input=none.tsv",), InputError, "input: no such file: none.tsv"),
        (("reference=twice.faa",), InputError, r"two records are named 'a' \(lines 1 and 3\): which is meant"),
        (("reference=masked.faa",), SequenceError, "masked.faa, line 1, record 'a': <mask> at position 2"),
        (("reference=gaps.faa",), SequenceError, "gaps.faa, line 1, record 'a': letter '-' at position 3 .*; remove"),
        (("reference=dna.fa",), SequenceError, "this looks like DNA, and the model reads proteins: translate it first"),
        (("input=bare.tsv",), InputError, "bare.tsv, row 1: protein is missing, and .* holds 3 proteins"),
        (("input=other.tsv",), InputError, r"there is no column 'variant' \(found: a, b\)"),
    ],
)
def test_bad_requests_leave_nothing(
    files: Path, words: tuple[str, ...], error: type[CistronError], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(files)
    write_table(files / "v.tsv", [*VARIANTS, ("c", "E1K")])
    (files / "twice.faa").write_text(">a\nMKT\n>a\nMKV\n")
    (files / "masked.faa").write_text(">a\nM<mask>T\n")
    (files / "gaps.faa").write_text(">a\nMK-T\n")
    (files / "dna.fa").write_text(f">a\n{'ACGTTGCAGT' * 8}\n")
    (files / "bare.tsv").write_text("variant\nM1V\n")
    (files / "other.tsv").write_text("a\tb\n1\t2\n")
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(error, match=message):
        run(config(files, *words))
    assert sorted(path.name for path in files.iterdir()) == before


def test_dna_models_are_refused(files: Path):
    save_checkpoint(tiny_evo2(), files / "evo2")
    with pytest.raises(InputError, match="substitutions need an ESM-2 model, and this is evo2"):
        run(config(files, f"model={files / 'evo2'}"))
