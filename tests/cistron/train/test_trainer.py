"""A real Ray Train run: two workers, checkpoints, held-out losses, an export, and the same command again."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import ray
import torch
from tests.cistron.train.settings import tiny_run

from cistron.config import merge, parse_yaml, resolve
from cistron.data.config import build_plan
from cistron.data.pack import pack
from cistron.data.prepare import prepare_corpus
from cistron.data.samples import held_out_samples
from cistron.errors import CheckpointError, ConfigError, InputError
from cistron.io.fasta import FastaRecord, write_fasta
from cistron.models.checkpoint import load_checkpoint
from cistron.models.manifest import read_manifest
from cistron.train.checkpoint import Manifest
from cistron.train.config import PretrainConfig
from cistron.train.run_folder import RunFolder
from cistron.train.trainer import check, locate, pretrain

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
    (broken / "checkpoint_manager_snapshot.json").write_text('{"ray_ver')  # A kill in the middle of Ray's own file.
    pretrain(settings(corpus, broken))

    expected, got = records(whole), records(broken)
    assert sorted(got) == [1, 2, 3, 4, 5, 6]
    assert [got[step]["loss"] for step in got] == [expected[step]["loss"] for step in expected]
    assert got[6]["loss"] < got[1]["loss"]
    assert [got[step]["valid_loss"] for step in (3, 6)] == [expected[step]["valid_loss"] for step in (3, 6)]
    assert any("step 6 of 6" in message for message in caplog.messages)
    assert any("mfu = 3 x forward FLOPs" in message for message in caplog.messages)
    check_folder(whole, broken)

    check_export_is_the_trained_model(corpus, broken)
    before = json.loads((broken / "summary.json").read_text())
    (broken / "summary.json").unlink()
    shutil.rmtree(broken / "export")
    pretrain(settings(corpus, broken))
    assert json.loads((broken / "summary.json").read_text()) == before, "killed before the export: nothing is trained"
    assert (broken / "export").exists()
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


def check_export_is_the_trained_model(corpus: Path, run_dir: Path) -> None:
    """The exported checkpoint, by the plain model, scores what the training run said at its end."""
    config = settings(corpus, run_dir)
    plan = build_plan(config.data, split="valid", objective="next_token")
    samples = list(held_out_samples(plan, range(min(9, plan.samples_per_epoch))))
    loss = weight = 0.0
    model = load_checkpoint(run_dir / "export")
    for batch in pack(samples, token_budget=1000):
        with torch.no_grad():
            logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
        scored = batch.targets != -100
        parts = torch.nn.functional.cross_entropy(logits[scored], batch.targets[scored], reduction="none")
        loss += float((parts * batch.weights[scored]).sum())
        weight += float(batch.weights[scored].sum())
    assert loss / weight == pytest.approx(records(run_dir)[6]["valid_loss"], abs=1e-5)


def refuse_contradictions(corpus: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seed: the run has 0, got 5"):
        pretrain(settings(corpus, run_dir, seed=5))
    with pytest.raises(ConfigError, match=r"train\.strategy\.kind: the run has 'fsdp2', got 'ddp'"):
        pretrain(settings(corpus, run_dir, strategy={"kind": "ddp"}))
    longer = {"steps": 9}
    other = run_dir / "other-corpus"
    shutil.copytree(corpus, other)
    index = other / "index.json"
    index.write_text(index.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CheckpointError, match="another corpus"):
        pretrain(settings(other, run_dir, **longer))
    shard = max((run_dir / "checkpoints/step=6/dcp").iterdir(), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .* bytes instead of"):
        pretrain(settings(corpus, run_dir, **longer))
    assert resolve_steps(run_dir) == 6, "a refused command leaves the settings of the run alone"


def resolve_steps(run_dir: Path) -> int:
    return parse_yaml((run_dir / "config.yaml").read_text(), source="config.yaml")["train"]["steps"]


def test_a_fault_in_the_model_is_named_by_its_path(tmp_path: Path) -> None:
    for change, match in (
        ({"mlp_sise": 3}, r"model\.mlp_sise: no such setting; did you mean 'mlp_size'"),
        ({"model_type": "evo3"}, r"model\.model_type: unknown model family 'evo3'"),
        ({"hidden_size": 15}, r"^model: "),
    ):
        config = tiny_run("corpus", tmp_path / "run")
        wrong = config.model_copy(update={"model": {**config.model, **change}})
        with pytest.raises(ConfigError, match=match):
            check(wrong)
    assert not (tmp_path / "run").exists()


def test_bad_runs_are_refused_before_a_worker_starts(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"4 workers with 1 CPUs each and 1 for reading need 5 .* has 4"):
        pretrain(tiny_run(corpus, run, num_workers=4))
    assert not run.exists(), "a run that never began does not claim its folder"
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
    folder.checkpoints.write(
        Manifest(step=2, cursor=16, tokens=9, world_size=2, folder="deepspeed", rng=(), config={}, corpus="")
    )
    with pytest.raises(CheckpointError, match=r"written by 2 workers.*train\.num_workers=2"):
        pretrain(tiny_run(corpus, tmp_path, schedule=RATES, strategy=zero, evaluate_every=3))


def test_a_damaged_shard_is_one_error_without_rays_own(corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "corpus"
    shutil.copytree(corpus, damaged)
    shard = damaged / "train/shard-00000.parquet"
    shard.write_bytes(
        b"PAR1" + bytes(200) + shard.read_bytes()[204:]
    )  # Its size is right, so it shows when it is read.
    with pytest.raises(InputError, match=r"^\S+shard-00000\.parquet: row group 0 cannot be read \([^\n]*$"):
        pretrain(settings(damaged, tmp_path / "run"))
