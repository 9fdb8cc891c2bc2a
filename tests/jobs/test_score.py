from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.tiny_models import tiny_esm2, tiny_evo2

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import CistronError, ConfigError, InputError, SequenceError
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.score import ScoreConfig, run

RECORDS = {"a": "ACGTACGTTGCA", "b": "GGG", "c": "TTACGNacgtRYACGATC", "d": "CA"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_evo2(), tmp_path / "evo2")
    save_checkpoint(tiny_esm2(), tmp_path / "esm2")
    (tmp_path / "in.fa").write_text("".join(f">{name} text\n{seq}\n" for name, seq in RECORDS.items()))
    (tmp_path / "in.faa").write_text(">p\nMKTAYIA\n>q\nGSV\n")
    return tmp_path


def config(files: Path, *words: str) -> ScoreConfig:
    given = [f"model={files / 'evo2'}", f"input={files / 'in.fa'}", f"output={files / 'out.parquet'}", *words]
    return resolve(ScoreConfig, parse_overrides(given))


@pytest.mark.parametrize("records_per_part", [1, 3, 100])
def test_every_record_is_scored_in_order(files: Path, records_per_part: int):
    assert run(config(files, f"records_per_part={records_per_part}")) == str(files / "out.parquet")
    table = pq.read_table(files / "out.parquet")
    expected = cistron.score_sequences(tiny_evo2(), list(RECORDS.values()))
    assert table["name"].to_pylist() == list(RECORDS)
    assert table["score"].to_pylist() == pytest.approx([score.score for score in expected], abs=1e-5)
    assert table["num_tokens"].to_pylist() == [score.num_tokens for score in expected]
    assert table.column_names == ["record", "name", "score", "num_tokens"]
    assert table["record"].to_pylist() == list(range(len(RECORDS)))


def test_options_reach_the_model(files: Path):
    run(config(files, "reduction=none", "prepend_bos=true", "vortex_compat=true", "precision=bf16"))
    table = pq.read_table(files / "out.parquet")
    model = tiny_evo2().bfloat16()
    expected = cistron.score_sequences(
        model, list(RECORDS.values()), reduction="none", prepend_bos=True, vortex_compat=True
    )
    for got, want in zip(table["per_token"].to_pylist(), expected, strict=True):
        assert got == pytest.approx(want.per_token, abs=1e-6)
    run(config(files, "reverse_complement=true", "reduction=sum"))
    both = cistron.score_sequences(tiny_evo2(), list(RECORDS.values()), reduction="sum", reverse_complement=True)
    scores = pq.read_table(files / "out.parquet")["score"].to_pylist()
    assert scores == pytest.approx([score.score for score in both], abs=1e-4)


def test_proteins_from_a_url_to_a_url(files: Path):
    run(
        config(
            files,
            f"model={(files / 'esm2').as_uri()}",
            f"input={(files / 'in.faa').as_uri()}",
            f"output={(files / 'out.parquet').as_uri()}",
        )
    )
    expected = cistron.score_sequences(tiny_esm2(), ["MKTAYIA", "GSV"])
    scores = pq.read_table(files / "out.parquet")["score"].to_pylist()
    assert scores == pytest.approx([score.score for score in expected], abs=1e-5)


def test_records_of_one_name_are_told_apart(files: Path, caplog: pytest.LogCaptureFixture):
    (files / "in.fa").write_text(">a\nACGT\n>b\nAC\n>a\nGGGA\n")
    run(config(files))
    table = pq.read_table(files / "out.parquet")
    assert (table["name"].to_pylist(), table["record"].to_pylist()) == (["a", "b", "a"], [0, 1, 2])
    assert caplog.text.count("score: 1 of 3 records") == 1
    assert "'a' (lines 1 and 5, records 0 and 2)" in caplog.text


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_proteins_have_a_pseudo_perplexity(files: Path, reduction: str):
    run(config(files, f"model={files / 'esm2'}", f"input={files / 'in.faa'}", f"reduction={reduction}"))
    found = pq.read_table(files / "out.parquet")["pseudo_perplexity"].to_pylist()
    assert found == pytest.approx(cistron.pseudo_perplexity(tiny_esm2(), ["MKTAYIA", "GSV"]), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (">a\nACGT\n>b\nACXT\n", SequenceError, r"in\.fa, line 3, record 'b': letter 'X' at position 3"),
        (f">a\nACGT\n>b\n{'A' * 300}\n", SequenceError, "record 'b': 300 nt is longer than the limit of 256"),
        (">a\nACGT\n>b\n>c\nAC\n", InputError, "record 'b' has no sequence"),
        ("", InputError, "the file is empty"),
    ],
)
@pytest.mark.parametrize("records_per_part", [1, 100])
def test_a_bad_record_is_named_and_no_output_is_left(
    files: Path, text: str, error: type[Exception], message: str, records_per_part: int
):
    (files / "in.fa").write_text(text)
    with pytest.raises(error, match=message):
        run(config(files, f"records_per_part={records_per_part}"))
    assert {path.name for path in files.iterdir()} == {"evo2", "esm2", "in.fa", "in.faa"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("input=nowhere.fa", "input: no such file: nowhere.fa"),
        ("model=nowhere/model", "no checkpoint at nowhere/model"),
        ("model=evo2_8b", "did you mean 'evo2_"),
        ("device=cuda:99", "device: 'cuda:99' is not a device of this machine"),
        ("device=gpu", "device: 'gpu' is not a device of this machine"),
    ],
)
def test_what_is_missing_is_named(files: Path, word: str, message: str):
    with pytest.raises(CistronError, match=message):
        run(config(files, word))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("output=scores.csv", r"output: .* must end in \.parquet"),
        ("reduction=median", "reduction: "),
        ("token_budget=0", "token_budget: "),
        ("tokenbudget=5", "tokenbudget: no such setting; did you mean 'token_budget'"),
    ],
)
def test_bad_settings_fail_before_anything_is_read(files: Path, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        config(files, word)


def test_settings_that_contradict_each_other_fail_before_anything_is_read(files: Path):
    with pytest.raises(ConfigError, match="reduction none has a score per token"):
        config(files, "reduction=none", "reverse_complement=true")
