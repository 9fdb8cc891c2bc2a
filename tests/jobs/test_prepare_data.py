from __future__ import annotations

import logging

import pytest
import ray

from cistron.config import resolve
from cistron.data.config import DataConfig, build_plan
from cistron.data.samples import iterate_samples
from cistron.errors import ConfigError, SequenceError
from cistron_jobs.prepare_data import PrepareDataConfig, run


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.mark.ray
def test_run_makes_a_corpus_that_training_can_read(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Relative paths must survive the way to Ray's workers.
    (tmp_path / "x.fa").write_text("".join(f">s{i}\n{'ACGTTGCA' * (i + 1)}\n" for i in range(30)))
    (tmp_path / "y.fa").write_text(">y\nACGT\n")
    settings = {
        "input": ["x.fa", "y.fa"],
        "output": "out",
        "alphabet": "dna",
        "row_length": 32,
        "validation_fraction": 0.2,
    }
    assert run(resolve(PrepareDataConfig, settings)) == "out"
    plan = build_plan(DataConfig(path="out", max_length=16), split="valid", objective="next_token")
    samples = list(iterate_samples(plan, range(plan.samples_per_epoch)))
    assert samples
    assert all(set(bytes(sample.input_ids.tolist())) <= set(b"ACGT") for sample in samples)


@pytest.mark.ray
def test_a_refused_file_is_one_error_without_rays_own(cluster, tmp_path, caplog, capfd):
    (tmp_path / "bad.fa").write_text(">a\nACGT\n>b\nAC!T\n")
    settings = {"input": str(tmp_path / "bad.fa"), "output": str(tmp_path / "out"), "alphabet": "dna"}
    with pytest.raises(SequenceError, match=r"bad\.fa: record 'b' \(line 3\): letter '!' at position 3"):
        run(resolve(PrepareDataConfig, settings))
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.fa"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alphabet": "rna"}, "alphabet: .*'dna' or 'protein'"),
        ({"validation_fraction": 1.0}, "validation_fraction: .*less than 1"),
        ({"row_lenght": 5}, r"row_lenght: no such setting; did you mean 'row_length'\?"),
        ({"rows_per_shard": 0}, "rows_per_shard: .*greater than or equal to 1"),
    ],
)
def test_settings_are_checked_at_the_door(change, match):
    with pytest.raises(ConfigError, match=match):
        resolve(PrepareDataConfig, {"input": "x.fa", "output": "out", "alphabet": "dna"} | change)
