from __future__ import annotations

import json

import pytest
import torch
from tests.cistron.train.settings import tiny_run

from cistron.errors import CheckpointError, ConfigError
from cistron.train.checkpoint import CheckpointStore, Manifest, random_state, restore_random_state
from cistron.train.run_folder import RunFolder, contradictions


def test_a_run_folder_belongs_to_one_run(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim(tiny_run("corpus", tmp_path))
    folder.claim(tiny_run("corpus", tmp_path, num_workers=2, checkpoint_every=1, log_every=5))
    with pytest.raises(
        ConfigError, match=r"(?s)train\.optimizer\.learning_rate: the run has 0\.02, got 0\.5.*train\.seed"
    ):
        folder.claim(tiny_run("corpus", tmp_path, optimizer={"learning_rate": 0.5}, seed=9))


def test_a_longer_run_is_the_same_run_only_if_its_rates_are():
    short, long = tiny_run("corpus", "run", steps=4), tiny_run("corpus", "run", steps=8)
    assert contradictions(short, long) == ["train.schedule.decay_steps: the run has 4, got 8"]
    rates = {"warmup_steps": 2, "decay_steps": 8}
    assert not contradictions(tiny_run("corpus", "run", steps=4, schedule=rates), long)
    constant = {"kind": "constant"}
    assert not contradictions(
        tiny_run("corpus", "run", steps=4, schedule=constant), tiny_run("corpus", "run", steps=8, schedule=constant)
    )


def test_another_strategy_is_named():
    (fault,) = contradictions(
        tiny_run("corpus", "run", strategy={"kind": "deepspeed", "zero_stage": 2}),
        tiny_run("corpus", "run", strategy={"kind": "deepspeed", "zero_stage": 3}),
    )
    assert fault == "train.strategy.zero_stage: the run has 2, got 3"


def manifest(step):
    return Manifest(
        step=step,
        cursor=8 * step,
        tokens=5,
        world_size=1,
        folder="dcp",
        rng=({"cpu": "AA=="},),
        config={"a": 1},
        corpus="f00d",
    )


def complete(store, tmp_path, step):
    shard = tmp_path / f"checkpoints/step={step}/dcp/shard"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(10))
    store.write(manifest(step))
    return shard


def test_only_complete_checkpoints_exist(tmp_path):
    store = CheckpointStore(str(tmp_path))
    assert store.latest() is None
    for step in (9, 100):
        (tmp_path / f"checkpoints/step={step}/dcp").mkdir(parents=True)
        store.write(manifest(step))
    torn = tmp_path / "checkpoints/step=200/dcp"
    torn.mkdir(parents=True)
    assert store.latest() == manifest(100)
    store.discard_torn()
    assert not torn.parent.exists()
    assert store.latest() == manifest(100)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    store = CheckpointStore(str(tmp_path))
    store.write(manifest(1))
    file = tmp_path / "checkpoints/step=1/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        store.latest()


def test_a_damaged_manifest_is_named(tmp_path):
    store = CheckpointStore(str(tmp_path))
    complete(store, tmp_path, 1)
    file = tmp_path / "checkpoints/step=1/manifest.json"
    for content in (file.read_bytes()[:-20], b"[]", b'{"version": 1}'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step=1/manifest\.json: damaged .*remove .*step=1 to resume"):
            store.latest()


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    store = CheckpointStore(str(tmp_path))
    shard = complete(store, tmp_path, 1)
    store.verify(store.latest())
    shard.write_bytes(bytes(9))
    with pytest.raises(CheckpointError, match=r"step=1/dcp/shard: 9 bytes instead of 10"):
        store.verify(store.latest())
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"step=1/dcp/shard: missing"):
        store.verify(store.latest())


def test_old_checkpoints_go_and_unfinished_ones_stay(tmp_path):
    store = CheckpointStore(str(tmp_path))
    for step in (2, 10, 7):
        complete(store, tmp_path, step)
    (tmp_path / "checkpoints/step=12/dcp").mkdir(parents=True)
    store.prune(2)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"step=7", "step=10", "step=12"}
    assert store.latest().step == 10


def test_random_state_survives_a_round_trip():
    torch.manual_seed(5)
    torch.rand(3)
    states = json.loads(json.dumps(random_state(torch.device("cpu"))))
    expected = torch.rand(7)
    restore_random_state(states, torch.device("cpu"))
    assert torch.equal(torch.rand(7), expected)
