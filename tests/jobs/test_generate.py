from __future__ import annotations

import json
from pathlib import Path

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
    generations = run(config(files))
    expected = cistron.generate(tiny_evo2(), PROMPTS, num_tokens=9, seed=1)
    assert [g.text for g in generations] == [g.text for g in expected]
    shown = capsys.readouterr().out
    assert all(g.text in shown for g in generations)
    assert "p2" in shown


def test_settings_reach_the_model(files: Path):
    words = ["temperature=2", "top_k=0", "top_p=0.9", "allowed=AN", "stop=[AA, NN]", "prefill_chunk=3"]
    generations = run(config(files, *words))
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
    assert [(g.text, g.finish_reason) for g in generations] == [(g.text, g.finish_reason) for g in expected]
    assert config(files, "allowed=null").allowed is None


def test_json_and_fasta_outputs(files: Path):
    generations = run(config(files, f"output={files / 'out.json'}"))
    rows = json.loads((files / "out.json").read_text())
    assert [row["name"] for row in rows] == ["p0", "p1", "p2"]
    assert [row["prompt"] + row["text"] for row in rows] == [
        p + g.text for p, g in zip(PROMPTS, generations, strict=True)
    ]
    assert rows[0]["logprobs"] == pytest.approx(generations[0].logprobs)
    assert rows[0]["finish_reason"] == "length"
    run(config(files, f"output={files / 'out.fa.gz'}"))
    records = list(read_fasta(files / "out.fa.gz"))
    assert [record.sequence for record in records] == [row["prompt"] + row["text"] for row in rows]
    assert records[1].description == "prompt=2 generated=9"


@pytest.mark.parametrize(
    ("word", "count"), [("prompts=[ACGT, gg]", 2), ("prompts=ACGTAC", 1), (f"prompts={'A' * 240}", 1), ("stop=AA", 3)]
)
def test_prompts_as_text(files: Path, word: str, count: int):
    assert len(run(config(files, word))) == count


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("prompts=nowhere.fa", InputError, "prompts: no such file, and not a DNA sequence: nowhere.fa"),
        ("prompts=", InputError, "prompts: the request is empty"),
        ("prompts=MKL", InputError, "prompts: .*letter 'L' at position 3"),
        (f"prompts={'A' * 300}", SequenceError, "prompt 0: 300 nt is longer than the limit of 256"),
        ("prompts=[]", InputError, "prompts: the request is empty"),
        ("prompts=[AC, AJ]", SequenceError, "prompt 1: letter 'J' at position 2"),
        ("num_tokens=300", SequenceError, "prompt 0: .* exceed the model's limit of 256"),
        ("temperature=0", InputError, "temperature must be above 0"),
        ("top_k=-1", InputError, "top_k must be from 0"),
    ],
)
def test_bad_requests_leave_no_output(files: Path, word: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        run(config(files, word, f"output={files / 'out.json'}"))
    assert {path.name for path in files.iterdir()} == {"evo2", "prompts.fa"}


@pytest.mark.parametrize(
    ("word", "message"),
    [("num_tokens=-1", "num_tokens: "), ("output=x.csv", "output: .* must end in"), ("top_q=1", "did you mean 'top_")],
)
def test_bad_settings(files: Path, word: str, message: str):
    with pytest.raises(ConfigError, match=message):
        config(files, word)
