from __future__ import annotations

import gzip
import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray import cloudpickle
from tests.tiny_models import tiny_esm2, tiny_evo2

import cistron
from cistron import __version__ as VERSION
from cistron.config import parse_overrides, resolve
from cistron.errors import CapabilityError, CistronError, ConfigError, InputError
from cistron.io.vcf import read_vcf
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.variants import VariantsConfig, VariantScorer, run, variant_parts

CHR1 = "".join(random.Random(5).choices("ACGT", k=200))
HEADER = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def base(pos: int, shift: int = 0) -> str:
    return "ACGT"[("ACGT".index(CHR1[pos - 1]) + shift) % 4]


GOOD = [(pos, base(pos), base(pos, shift)) for pos in (1, 50, 120) for shift in (1, 2)]
GOOD += [(150, base(150), base(150) + "GG"), (160, CHR1[159:162], base(160))]
LINES = [f"1\t{pos}\t.\t{base(pos)}\t{base(pos, 1)},{base(pos, 2)}\t.\t.\t." for pos in (1, 50, 120)]
LINES += [f"1\t{pos}\t.\t{ref}\t{alt}\t.\t.\tDP=3" for pos, ref, alt in GOOD[-2:]]
LINES += [f"1\t170\t.\t{base(170)}\t<DEL>\t.\t.\t.", f"1\t171\t.\t{base(171)}\t.\t.\t.\t."]
MISMATCH = f"1\t172\t.\t{base(172, 1)}\t{base(172)}\t.\t.\t."


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_evo2(), tmp_path / "evo2")
    (tmp_path / "ref.fa").write_text(f">chr1 a\n{CHR1[:100]}\n{CHR1[100:].lower()}\n")
    text = HEADER + "\n".join([*LINES, MISMATCH]) + "\n"
    (tmp_path / "in.vcf.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def config(files: Path, *words: str) -> VariantsConfig:
    given = {
        "model": str(files / "evo2"),
        "input": str(files / "in.vcf.gz"),
        "reference": str(files / "ref.fa"),
        "output": str(files / "out.parquet"),
        "window": "64",
        "actors": "0",
    }
    given.update(word.split("=", 1) for word in words)  # type: ignore[misc]
    return resolve(VariantsConfig, parse_overrides(f"{name}={value}" for name, value in given.items()))


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("words", [(), ("records_per_part=1", "token_budget=100"), ("letters_per_part=1",)])
def test_one_row_per_alternative_and_the_scores_in_the_vcf(files: Path, words: tuple[str, ...]):
    words = ("reverse_complement=true", f"annotated_vcf={files / 'out.vcf'}", *words)
    assert run(config(files, *words)) == str(files / "out.parquet")
    found = rows(files / "out.parquet")
    variants = [("chr1", *variant) for variant in GOOD]
    expected = cistron.score_variants(tiny_evo2(), variants, {"chr1": CHR1}, window=64, reverse_complement=True)
    assert [row["score"] for row in found[:8]] == pytest.approx(expected["score"].to_pylist(), abs=1e-5)
    assert [(row["chrom"], row["pos"], row["ref"], row["alt"]) for row in found[:8]] == [("1", *v) for v in GOOD]
    assert [row["record"] for row in found] == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7]
    statuses = [row["status"] for row in found]
    assert statuses == ["scored"] * 8 + ["symbolic_allele", "no_alt", "ref_mismatch"]
    assert [row["window_letters"] for row in found[:3]] == [32, 32, 64]
    lines = (files / "out.vcf").read_text().splitlines()
    infos = [line.split("\t")[7] for line in lines if not line.startswith("#")]
    assert infos[0].startswith(f"EVO2_DELTA={found[0]['score']:.8g},{found[1]['score']:.8g};EVO2_REFLL=")
    assert infos[3].startswith("DP=3;EVO2_DELTA=")
    assert infos[5:] == [
        "EVO2_DELTA=.;EVO2_REFLL=.;EVO2_ALTLL=.;EVO2_STATUS=symbolic_allele",
        ".",
        "EVO2_DELTA=.;EVO2_REFLL=.;EVO2_ALTLL=.;EVO2_STATUS=ref_mismatch",
    ]
    assert len([line for line in lines if line.startswith("##INFO=<ID=EVO2_")]) == 4
    assert list(read_vcf(files / "out.vcf")) == list(read_vcf(files / "in.vcf.gz"))


def test_a_table_in_one_strand_and_the_same_result_twice(files: Path, caplog: pytest.LogCaptureFixture):
    table = "chrom,pos,ref,alt\n" + "".join(f"NC_000001.10,{pos},{ref},{alt}\n" for pos, ref, alt in GOOD)
    (files / "v.csv").write_text(table)
    words = (f"input={files / 'v.csv'}",)
    run(config(files, *words))
    found = rows(files / "out.parquet")
    expected = cistron.score_variants(tiny_evo2(), [("chr1", *v) for v in GOOD], files / "ref.fa", window=64)
    assert [row["score"] for row in found] == pytest.approx(expected["score"].to_pylist(), abs=1e-5)
    with caplog.at_level("INFO"):
        run(config(files, *words, "token_budget=77"))
    assert "complete already" in caplog.text
    assert "variants: 8 of 8 alleles scored" in caplog.text


def test_what_is_not_scored_is_said(files: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        run(config(files))
    assert "variants: 8 of 11 alleles scored" in caplog.text
    assert f"1 ref_mismatch, the first: 1:172 {base(172, 1)}>{base(172)}: the reference has" in caplog.text
    assert f"1 of 11 alleles disagree with {files / 'ref.fa'}: is it the right assembly?" in caplog.text


def test_a_damaged_model_leaves_nothing(files: Path):
    model = tiny_evo2()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_checkpoint(model, files / "damaged")
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(CapabilityError, match="the model returned NaN"):
        run(config(files, f"model={files / 'damaged'}", f"annotated_vcf={files / 'out.vcf'}"))
    assert sorted(path.name for path in files.iterdir()) == before


def test_a_dot_among_alternatives_has_a_place_of_its_own(files: Path):
    text = HEADER + f"1\t170\t.\t{base(170)}\t.,{base(170, 1)}\t.\t.\t.\n1\t171\t.\t{base(171)}\t.\t.\t.\tDP=1\n"
    (files / "dot.vcf").write_text(text)
    run(config(files, f"input={files / 'dot.vcf'}", f"annotated_vcf={files / 'out.vcf'}"))
    infos = [line.split("\t")[7] for line in (files / "out.vcf").read_text().splitlines() if line[0] != "#"]
    assert infos[0].endswith(";EVO2_STATUS=no_alt,scored")
    assert infos[1] == "DP=1"


def test_an_annotated_vcf_can_be_asked_for_later(files: Path):
    pysam = pytest.importorskip("pysam", reason="pysam is not installed")
    run(config(files))
    made = (files / "out.parquet").stat().st_mtime_ns
    run(config(files, f"annotated_vcf={files / 'out.vcf.gz'}"))
    assert (files / "out.parquet").stat().st_mtime_ns == made
    with pysam.VariantFile(str(files / "out.vcf.gz")) as file:
        [record] = file.fetch("1", 159, 160)
        [header] = [line for line in str(file.header).splitlines() if line.startswith("##INFO=<ID=EVO2_DELTA,")]
    assert header.endswith(
        f'Source="{files / "evo2"}, window 64, one strand, reference {files / "ref.fa"}",Version="cistron {VERSION}">'
    )
    assert record.info["EVO2_DELTA"][0] == pytest.approx(rows(files / "out.parquet")[7]["score"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            ("on_mismatch=error",),
            InputError,
            r"record 8: 1:172 [ACGT]>.*the reference has .*ref_mismatch; on_mismatch=report",
        ),
        (("window=1",), ConfigError, "window"),
        (("window=500",), InputError, "window must be from 2 to the model's limit of 256, got 500"),
        (("output=x.csv",), ConfigError, "must end in .parquet"),
        (("annotated_vcf=x.bcf",), InputError, r"named \.vcf, \.vcf\.gz or \.vcf\.bgz"),
        (("input=v.csv", "annotated_vcf=x.vcf"), ConfigError, "there is no VCF to annotate"),
        (("input=none.vcf",), InputError, "input: no such file: none.vcf"),
        (("reference=none.fa",), InputError, "reference: no such file: none.fa"),
    ],
)
def test_bad_requests_leave_nothing(files: Path, words: tuple[str, ...], error: type[CistronError], message: str):
    before = sorted(path.name for path in files.iterdir())
    with pytest.raises(error, match=message):
        run(config(files, *words))
    assert sorted(path.name for path in files.iterdir()) == before


def test_proteins_are_refused(files: Path):
    save_checkpoint(tiny_esm2(), files / "esm2")
    with pytest.raises(InputError, match="DNA variants are scored with Evo 2, and this is esm2"):
        run(config(files, f"model={files / 'esm2'}"))


def test_what_is_sent_to_an_actor_survives_the_way(files: Path):
    settings = config(files)
    parts, scorer = pickle.loads(cloudpickle.dumps((partial(variant_parts, settings, 64), VariantScorer(settings, 64))))
    run(settings)
    there = pa.concat_tables(scorer(tiny_evo2(), part) for part in parts())
    assert there["score"].to_pylist() == pytest.approx(
        pq.read_table(files / "out.parquet")["score"].to_pylist(), abs=1e-5
    )
