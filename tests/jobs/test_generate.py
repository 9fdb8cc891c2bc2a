from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.tiny_models import tiny_evo2

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import ConfigError, InputError, SequenceError
from cistron.io.fasta import read_fasta
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.generate import GenerateConfig, run

PROMPTS = ["ACGTACGT", "GG", "TTACG"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_evo2(), tmp_path / "evo2")
    (tmp_path / "prompts.fa").write_text("".join(f">p{i} text\n{prompt}\n" for i, prompt in enumerate(PROMPTS)))
    return tmp_path


def config(files: Path, *words: str) -> GenerateConfig:
    given = [f"model={files / 'evo2'}", f"prompts={files / 'prompts.fa'}", "num_tokens=9", "seed=1", *words]
    return resolve(GenerateConfig, parse_overrides(given))


def test_the_table_shows_every_continuation(files: Path, capsys: pytest.CaptureFixture[str]):
    assert run(config(files)) is None
    expected = cistron.generate(tiny_evo2(), PROMPTS, num_tokens=9, seed=1)
    shown = capsys.readouterr().out
    assert all(g.text in shown for g in expected)
    assert "p2" in shown


def test_settings_reach_the_model(files: Path):
    words = ["temperature=2", "top_k=0", "top_p=0.9", "allowed=AN", "stop=[AA, NN]", "prefill_chunk=3"]
    run(config(files, *words, f"output={files / 'out.parquet'}"))
    rows = pq.read_table(files / "out.parquet").to_pylist()
    expected = cistron.generate(
        tiny_evo2(),
        PROMPTS,
        num_tokens=9,
        seed=1,
        temperature=2.0,
        top_k=0,
        top_p=0.9,
        allowed="AN",
        stop=("AA", "NN"),
    )
    assert [(row["text"], row["finish_reason"]) for row in rows] == [(g.text, g.finish_reason) for g in expected]
    assert config(files, "allowed=null").allowed is None


def test_the_context_is_extended_only_when_asked(files: Path, capsys: pytest.CaptureFixture[str]):
    (files / "prompts.fa").write_text(">long\n" + "ACGT" * 80 + "\n")
    with pytest.raises(SequenceError, match=r"record 'long'.* 256"):
        run(config(files))
    run(config(files, "extend_context=true"))
    expected = cistron.generate(tiny_evo2(), ["ACGT" * 80], num_tokens=9, seed=1, extend_context=True)[0]
    assert expected.text in capsys.readouterr().out


@pytest.mark.parametrize("records_per_part", [1, 2, 100])
@pytest.mark.parametrize("repeats", [1, 2])
def test_files_hold_what_one_request_gives(files: Path, records_per_part: int, repeats: int):
    """Neither the parts nor the kind of file shows in a continuation; a prompt's repeats differ from each other."""
    prompts = PROMPTS * repeats
    (files / "prompts.fa").write_text("".join(f">p{i} text\n{prompt}\n" for i, prompt in enumerate(prompts)))
    expected = cistron.generate(tiny_evo2(), prompts, num_tokens=9, seed=1)
    for output in ("out.json", "out.fa.gz"):
        run(config(files, f"output={files / output}", f"records_per_part={records_per_part}"))
    rows = json.loads((files / "out.json").read_text())
    assert (files / "out.json").read_text() == json.dumps(rows, indent=2) + "\n"
    assert [row["name"] for row in rows] == [f"p{i}" for i in range(len(prompts))]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["text"] for row in rows] == [g.text for g in expected]
    assert rows[0]["logprobs"] == pytest.approx(expected[0].logprobs, abs=1e-5)
    assert rows[0]["token_ids"] == expected[0].token_ids
    assert rows[0]["finish_reason"] == "length"
    records = list(read_fasta(files / "out.fa.gz"))
    assert [record.sequence for record in records] == [row["prompt"] + row["text"] for row in rows]
    assert records[1].description == "prompt=2 generated=9"


@pytest.mark.parametrize(
    ("word", "count"), [("prompts=[ACGT, gg]", 2), ("prompts=ACGTAC", 1), (f"prompts={'A' * 240}", 1), ("stop=AA", 3)]
)
def test_prompts_as_text(files: Path, word: str, count: int):
    run(config(files, word, f"output={files / 'out.json'}"))
    assert len(json.loads((files / "out.json").read_text())) == count


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("prompts=nowhere.fa", InputError, "prompts: no such file, and not a DNA sequence: nowhere.fa"),
        ("prompts=", InputError, "prompts: the request is empty"),
        ("prompts=MKL", InputError, "prompts: .*letter 'L' at position 3"),
        (f"prompts={'A' * 300}", SequenceError, "prompt 0: 300 nt and .* 256; extend_context=True"),
        ("prompts=[]", InputError, "prompts: the request is empty"),
        ("prompts=[AC, AJ]", SequenceError, "prompt 1: letter 'J' at position 2"),
        ("num_tokens=300", SequenceError, r"prompts\.fa, line 1, record 'p0': 8 nt and 300 new tokens exceed .* 256"),
        ("temperature=0", InputError, "temperature must be above 0"),
        ("top_k=-1", InputError, "top_k must be from 0"),
    ],
)
def test_bad_requests_leave_no_output(files: Path, word: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        run(config(files, word, f"output={files / 'out.json'}"))
    assert {path.name for path in files.iterdir()} == {"evo2", "prompts.fa"}


@pytest.mark.parametrize("word", ["prompts=[AC, AJ]", f"prompts={'A' * 300}", "stop=[512]", "allowed=€"])
def test_a_bad_request_is_refused_before_weights_are_read(files: Path, word: str):
    (files / "evo2" / "model.safetensors").unlink()
    with pytest.raises((InputError, SequenceError)):
        run(config(files, word))


@pytest.mark.parametrize(
    ("word", "message"),
    [("num_tokens=-1", "num_tokens: "), ("output=x.csv", "output: .* must end in"), ("top_q=1", "did you mean 'top_")],
)
def test_bad_settings(files: Path, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        config(files, word)
