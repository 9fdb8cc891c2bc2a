from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.config import parse_overrides, resolve
from cistron.errors import CheckpointError, InputError, UnknownNameError
from cistron.evaluation import published
from cistron.inference.generate import generate
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import save_checkpoint
from cistron.models.registry import build_model
from cistron_jobs.cli import main
from cistron_jobs.selftest import SelftestConfig, published_prompts, run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tiny_evo2(), tmp_path / "evo2")
    return tmp_path / "evo2"


def config(checkpoint: Path, *words: str) -> SelftestConfig:
    given = [f"model={checkpoint}", f"run_dir={checkpoint.parent / 'run'}", "length=70", *words]
    return resolve(SelftestConfig, parse_overrides(given))


def random_model(name: str) -> SequenceModel:
    model = build_model(name)
    model.init_weights(seed=0)
    return model


def summary(checkpoint: Path) -> dict:
    return json.loads((checkpoint.parent / "run" / "summary.json").read_text())


def test_a_random_model_passes_the_battery_and_says_what_it_skipped(checkpoint, capsys):
    run(config(checkpoint))
    written = summary(checkpoint)
    assert written["passed"]
    assert {"step by step = whole", "packed = one at a time"} <= {check["name"] for check in written["checks"]}
    assert list(written["skipped"]) == ["published loss, accuracy and identity"]
    assert written["precision_path"] == "fp32"
    assert "skipped" in capsys.readouterr().out


def test_the_long_sequence_may_be_shorter_than_the_short_prompts(checkpoint):
    report = run(config(checkpoint, "length=5"))
    assert "prompts of 1 to 4 tokens, then steps = whole" in [check.name for check in report.checks]


def test_a_protein_model_has_its_own_battery(tmp_path):
    save_checkpoint(tiny_esm2(), tmp_path / "esm2")
    run(config(tmp_path / "esm2"))
    assert [check["name"] for check in summary(tmp_path / "esm2")["checks"]] == [
        "padded = one at a time",
        "packed = one at a time",
    ]
    with pytest.raises(InputError, match="known for Evo 2, and this is esm2"):
        run(config(tmp_path / "esm2", "name=evo2_7b"))


def test_a_failed_check_is_written_and_ends_the_command_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(published.PUBLISHED, "evo2_tiny", published.Published(0.3, 86.0, lac_operon_accuracy=90.0))
    save_checkpoint(random_model("evo2_tiny"), tmp_path / "evo2")
    words = [f"model={tmp_path / 'evo2'}", f"run_dir={tmp_path / 'run'}", "length=20", "name=evo2_tiny"]
    assert main(["selftest", *words]) == 1
    written = summary(tmp_path / "evo2")
    assert not written["passed"]
    failed = [check["name"] for check in written["checks"] if not check["passed"]]
    assert failed == ["loss on the four published prompts", "accuracy on them, %", "accuracy on the lac operon, %"]
    assert "checks failed: loss on the four published prompts" in capsys.readouterr().err


def test_names_without_published_numbers_are_told_apart(tmp_path, checkpoint):
    save_checkpoint(random_model("evo2_tiny"), tmp_path / "tiny")
    run(config(tmp_path / "tiny", "name=evo2_tiny", "length=20"))
    assert "no numbers are published" in summary(checkpoint)["skipped"]["published loss, accuracy and identity"]
    with pytest.raises(UnknownNameError, match="did you mean 'evo2_7b'"):
        run(config(checkpoint, "name=evo2-7b"))


def test_a_model_of_another_size_is_refused_under_a_published_name(checkpoint):
    with pytest.raises(CheckpointError, match=r"not evo2_40b: hidden_size is 32, of evo2_40b 8192"):
        run(config(checkpoint, "name=evo2_40b"))
    assert not (checkpoint.parent / "run").exists()


def test_loss_and_accuracy_are_those_of_the_plain_forward_pass():
    model, losses, hits = tiny_evo2(), [], []
    prompts = {"x": "ACGTTGCATTGACA" * 4, published.LAC_OPERON: "GGATCCTTAACG" * 5}
    for prompt in prompts.values():
        ids = torch.tensor(list(prompt.encode()))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
        hits.append((logits.argmax(-1) == ids[1:]).float().mean().item() * 100)
    expected = published.Published(sum(losses) / 2, sum(hits) / 2, lac_operon_accuracy=hits[1])
    loss, accuracy, lac_operon = published.published_checks(model, expected, prompts)
    assert loss.measured < 0.02, "bf16 numbers near 6 are 0.03 apart"
    assert accuracy.measured < 3, "one nucleotide of these is 2 per cent"
    assert lac_operon.measured < 3


def test_generated_identity_counts_from_the_middle():
    model = tiny_evo2()
    starts = ["ACGTTGCATTGA", "GGATCCTTAACG"]
    own = [g.text for g in generate(model, starts, num_tokens=12, top_k=1, allowed="ACGT")]
    prompts = [start + text for start, text in zip(starts, own, strict=True)]
    assert published.generated_identity(model, prompts, num_tokens=12, allowed="ACGT") == 100
    prompts[1] = prompts[1][:20] + "NNNN"
    assert published.generated_identity(model, prompts, num_tokens=12, allowed="ACGT") == pytest.approx(100 * 20 / 24)


def test_the_packaged_prompts_are_the_published_ones():
    digests = {name: hashlib.sha256(prompt.encode()).hexdigest()[:12] for name, prompt in published_prompts().items()}
    assert digests == {
        "L1RE2": "61aaa0e7af4d",
        published.LAC_OPERON: "fe23adff7ab5",
        "NC_007596.2": "f014724b175f",
        "NC_012920.1": "c24df880cda4",
    }
