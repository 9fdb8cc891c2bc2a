"""A real Ray Train run: two workers, checkpoints, held-out losses, an export, and the same command again."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import ray
from tests.cistron.train.settings import tiny_run

from cistron.config import merge, resolve
from cistron.data.prepare import prepare_corpus
from cistron.errors import CheckpointError, ConfigError, InputError
from cistron.io.fasta import FastaRecord, write_fasta
from cistron.models.checkpoint import load_checkpoint
from cistron.models.manifest import read_manifest
from cistron.train.checkpoint import Manifest
from cistron.train.config import PretrainConfig
from cistron.train.run_folder import RunFolder
from cistron.train.trainer import locate, pretrain

pytestmark = pytest.mark.ray

RATES = {"warmup_steps": 2, "decay_steps": 6}


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    letters = random.Random(1)
    records = [FastaRecord(f"r{i}", "", "".join(letters.choices("ACGTacgt", k=400))) for i in range(6)]
    write_fasta(folder / "genome.fasta", records)
    prepare_corpus(
        [folder / "genome.fasta"], folder / "corpus", alphabet="dna", row_length=100, validation_fraction=0.3
    )
    return folder / "corpus"


def settings(corpus: Path, run_dir: Path, **train: object) -> PretrainConfig:
    return tiny_run(
        corpus, run_dir, num_workers=2, evaluate_every=3, evaluate_samples=9, schedule=RATES, max_failures=0, **train
    )


def records(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return loss and held-out loss by step; a step that was written twice is an error."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = found.setdefault(record.pop("step"), {})
        assert not step.keys() & (record.keys() - {"time"}), "a step was recorded twice"
        step |= record
    return found


def test_a_stopped_run_continues_exactly(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cistron")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pretrain(settings(corpus, whole, keep_checkpoints=1)) == str(whole)
    pretrain(settings(corpus, broken, steps=4, strategy={"kind": "fsdp2"}))
    pretrain(settings(corpus, broken))

    expected, got = records(whole), records(broken)
    assert sorted(got) == [1, 2, 3, 4, 5, 6]
    assert [got[step]["loss"] for step in got] == [expected[step]["loss"] for step in expected]
    assert got[6]["loss"] < got[1]["loss"]
    assert [got[step]["valid_loss"] for step in (3, 6)] == [expected[step]["valid_loss"] for step in (3, 6)]
    assert any("step 6 of 6" in message for message in caplog.messages)
    assert any("mfu = 3 x forward FLOPs" in message for message in caplog.messages)
    check_folder(whole, broken)

    pretrain(settings(corpus, broken))
    assert "has already ended at step 6" in caplog.messages[-1]
    refuse_contradictions(corpus, broken)


def check_folder(whole: Path, broken: Path) -> None:
    assert [folder.name for folder in (whole / "checkpoints").iterdir()] == ["step=6"], "keep_checkpoints=1"
    manifest = json.loads((broken / "checkpoints/step=6/manifest.json").read_text())
    assert (manifest["cursor"], manifest["world_size"], len(manifest["rng"])) == (48, 2, 2)
    assert manifest["config"]["train"]["global_batch_size"] == 8
    assert list((broken / "tensorboard").iterdir())
    summary = json.loads((broken / "summary.json").read_text())
    assert summary["step"] == 6
    assert summary["valid_loss"] == records(broken)[6]["valid_loss"]
    model = load_checkpoint(broken / "export")
    assert model.config.parametrization == "inference"
    assert read_manifest(broken / "export")["provenance"]["step"] == 6
    for name, tensor in load_checkpoint(whole / "export").state_dict().items():
        assert model.state_dict()[name].equal(tensor), name


def refuse_contradictions(corpus: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seed: the run has 0, got 5"):
        pretrain(settings(corpus, run_dir, seed=5))
    with pytest.raises(ConfigError, match=r"train\.strategy\.kind: the run has 'fsdp2', got 'ddp'"):
        pretrain(settings(corpus, run_dir, strategy={"kind": "ddp"}))


def test_bad_runs_are_refused_before_a_worker_starts(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"4 workers with 1 CPUs each and 1 for reading need 5 .* has 4"):
        pretrain(tiny_run(corpus, run, num_workers=4))
    with pytest.raises(ConfigError, match=r"train\.token_budget=8 is less than .* \(32\)"):
        pretrain(tiny_run(corpus, tmp_path / "other", token_budget=8))
    with pytest.raises(InputError, match="not a prepared corpus"):
        pretrain(tiny_run(tmp_path / "nothing", tmp_path / "other"))
    long = merge(tiny_run(corpus, tmp_path / "other").model_dump(), {"data": {"max_length": 65}})
    with pytest.raises(ConfigError, match=r"max_length=65 is longer than the model's context of 64 nt"):
        pretrain(resolve(PretrainConfig, merge(long, {"train": {"token_budget": 100}})))
    assert not (tmp_path / "other").exists()


def test_a_zero_checkpoint_needs_its_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    zero = {"kind": "deepspeed", "zero_stage": 2}
    folder = RunFolder(str(tmp_path))
    folder.claim(locate(settings(corpus, tmp_path, strategy=zero)))
    folder.checkpoints.write(Manifest(step=2, cursor=16, tokens=9, world_size=2, folder="deepspeed", rng=(), config={}))
    with pytest.raises(CheckpointError, match=r"written by 2 workers.*train\.num_workers=2"):
        pretrain(tiny_run(corpus, tmp_path, schedule=RATES, strategy=zero, evaluate_every=3))
