from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.tiny_models import tiny_evo2

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import CistronError, ConfigError, InputError
from cistron.evaluation.brca1 import read_edited_variants
from cistron.evaluation.variant_effect import consequence_scores, discrimination
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.evaluate import EvaluateConfig, run

START = 41_276_000
SLICE = "".join(random.Random(7).choices("ACGT", k=400))
TABLE = os.environ.get("CISTRON_FINDLAY_TABLE")
"""The publisher's table, which may not be copied into the project: tests of it run where somebody has it."""


def rows() -> list[tuple[str, int, str, str, str, str]]:
    """Three variants of each of 20 places, with classes that depend on the consequence."""
    source, found = random.Random(1), []
    for place in range(100, 300, 10):
        ref = SLICE[place]
        for alt in "ACGT".replace(ref, ""):
            consequence = source.choice(["Missense", "Synonymous", "Nonsense"])
            lost = source.random() < {"Missense": 0.5, "Synonymous": 0.1, "Nonsense": 0.9}[consequence]
            found.append(
                ("17", START + 1 + place, ref, alt, consequence, "LOF" if lost else source.choice(["FUNC", "INT"]))
            )
    return found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_evo2(), tmp_path / "model")
    (tmp_path / "slice.fa").write_text(f">NC_000017.10:{START + 1}-{START + len(SLICE)} chr17\n{SLICE}\n")
    lines = ["Supplementary Table", "chromosome,position (hg19),reference,alt,consequence,func.class,other"]
    lines += [",".join(map(str, row)) + ",x" for row in rows()[::-1]]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def config(files: Path, *words: str) -> EvaluateConfig:
    given = {
        "benchmark": "brca1",
        "model": str(files / "model"),
        "data": str(files / "table.csv"),
        "fasta": str(files / "slice.fa"),
        "run_dir": str(files / "run"),
        "window": "64",
        "actors": "0",
        "resamples": "200",
        "seed": "0",
    }
    given.update(word.split("=", 1) for word in words)  # type: ignore[misc]
    return resolve(EvaluateConfig, parse_overrides(f"{name}={value}" for name, value in given.items()))


def test_from_the_table_to_numbers_and_pictures(
    files: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        result = run(config(files, f"output={files / 'out.json'}"))
    # Of each place, 32 letters before the variant are read once, and 32 from it on by the reference and 3 alternatives.
    assert f"variants: 60 records, {20 * 32 + 20 * 4 * 32:,} tokens in " in caplog.text
    table = rows()
    scores = cistron.score_variants(tiny_evo2(), [row[:4] for row in table], {"17": "N" * START + SLICE}, window=64)[
        "score"
    ]
    expected = discrimination(
        [row[5] == "LOF" for row in table], [-score for score in scores.to_pylist()], resamples=200
    )
    baseline = discrimination(
        [row[5] == "LOF" for row in table], consequence_scores([row[4] for row in table]), resamples=200
    )
    assert result["results"]["model"]["auroc"]["value"] == pytest.approx(expected.auroc.value)
    assert result["results"]["model"]["auroc"]["low"] == pytest.approx(expected.auroc.low)
    assert result["results"]["consequence class alone"]["auprc"]["value"] == pytest.approx(baseline.auprc.value)
    assert (result["num_variants"], result["num_reference_windows"]) == (60, 20)
    assert (
        json.loads((files / "run" / "summary.json").read_text())
        == result
        == json.loads((files / "out.json").read_text())
    )
    written = pq.read_table(files / "run" / "scores.parquet")
    assert written.num_rows == 60
    assert {"score", "mean_score", "consequence", "function_class"} <= set(written.column_names)
    pictures = {path.name for path in (files / "run" / "report").iterdir()}
    assert pictures == {f"brca1_{kind}.{suffix}" for kind in ("strip", "roc", "pr") for suffix in ("png", "csv")}
    printed = capsys.readouterr().out
    assert "60 variants, 20 distinct reference windows" in printed
    assert f"AUROC {expected.auroc}" in printed


def test_the_same_folder_goes_on(files: Path, caplog: pytest.LogCaptureFixture):
    first = run(config(files))
    with caplog.at_level("INFO"):
        assert run(config(files)) == first
    assert "complete already" in caplog.text


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("window=300",), InputError, "model's limit of 256"),
        (("window=256",), InputError, "needs .* but the reference holds 41,276,001 to 41,276,400 only"),
        (("split=valid",), ConfigError, "split applies to benchmark=perplexity, and this is brca1"),
        (("benchmark=perplexity",), ConfigError, "applies to benchmark=brca1, and this is perplexity"),
        (("fasta=null",), ConfigError, "needs the reference"),
        (("run_dir=s3://bucket/run",), ConfigError, "local folder"),
        (("data=none.csv",), InputError, "none.csv: no such file"),
    ],
)
def test_bad_requests_leave_no_run(files: Path, words: tuple[str, ...], error: type[CistronError], message: str):
    with pytest.raises(error, match=message):
        run(config(files, *words))
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no header with the columns 'chrom' or 'chromosome'"),
        ("chrom,pos,ref,alt,consequence,class\n", "no rows below the header"),
        ("chrom,pos,ref,alt,consequence,class\n17,x,A,C,Missense,LOF\n", "row 2: the position must be a whole number"),
        (
            "chrom,pos,ref,alt,consequence,class\n17,5,A,C,Missense,lost\n",
            "row 2: the class must be one of FUNC, INT, LOF",
        ),
        ("chrom,pos,ref,alt,consequence,class\n17,5,A\n", "row 2: only 3 cells"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_edited_variants(tmp_path / "t.csv")


@pytest.mark.skipif(TABLE is None, reason="CISTRON_FINDLAY_TABLE does not name supplementary table 1 of Findlay 2018")
def test_the_published_table_and_its_baseline():
    assert TABLE is not None
    found = read_edited_variants(TABLE)
    assert len(found) == 3893
    assert len({row.variant.pos for row in found}) == 1326
    baseline = discrimination(
        [row.is_loss_of_function for row in found], consequence_scores([row.consequence for row in found])
    )
    assert baseline.auroc.value == pytest.approx(0.763, abs=5e-4)
