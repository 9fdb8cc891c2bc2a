"""The machinery under the jobs, on Ray: several actors, a killed one, errors from afar."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tests.tiny_models import tiny_esm2

from cistron.config import parse_overrides, resolve
from cistron.errors import InputError
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.bulk.pool import Pool, plan_pool
from cistron_jobs.embed import EmbedConfig, _embedded
from cistron_jobs.embed import run as embed
from cistron_jobs.inference_job import run_record_job
from cistron_jobs.score import ScoreConfig
from cistron_jobs.score import run as score

pytestmark = pytest.mark.ray

NUM_PROTEINS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        num_gpus=2,  # Ray counts them and does not look; the models run on the CPU.
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, proteins, and the output of this process alone."""
    folder = tmp_path_factory.mktemp("bulk")
    save_checkpoint(tiny_esm2(), folder / "esm2")
    draw = random.Random(0)
    proteins = ("".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=draw.randint(1, 80))) for _ in range(NUM_PROTEINS))
    (folder / "in.faa").write_text("".join(f">p{i}\n{protein}\n" for i, protein in enumerate(proteins)))
    embed(config(folder, "alone.parquet", "actors=0"))
    return folder


def config(folder: Path, output: str, *words: str) -> EmbedConfig:
    given = [f"model={folder / 'esm2'}", f"input={folder / 'in.faa'}", f"output={folder / output}"]
    return resolve(
        EmbedConfig, parse_overrides([*given, "device=cpu", "records_per_part=3", "cpus_per_actor=1", *words])
    )


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("cluster")
def test_one_actor_gives_the_file_of_this_process(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(files)  # Relative paths must survive the way to Ray's workers.
    words = ["model=esm2", "input=in.faa", "output=one.parquet"]
    with caplog.at_level(logging.INFO):
        embed(config(files, "one.parquet", *words))  # Connected to Ray, the job uses it without being asked to.
    assert (files / "one.parquet").read_bytes() == (files / "alone.parquet").read_bytes()
    assert f"embed: {NUM_PROTEINS} records, " in caplog.text
    assert "1 actor, " in caplog.text


@pytest.mark.usefixtures("cluster")
def test_what_an_actor_refuses_is_one_error_without_rays_own(
    files: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    before = left_in(files)
    words = [
        f"model={files / 'esm2'}",
        f"input={files / 'in.faa'}",
        f"output={files / 'no.parquet'}",
        "actors=1",
        "device=cpu",
    ]
    with pytest.raises(InputError, match="prepend_bos applies to DNA models, and this is esm2"):
        score(resolve(ScoreConfig, parse_overrides([*words, "prepend_bos=true"])))
    assert not any(record.name.startswith("ray.data") for record in caplog.records if record.levelno >= logging.ERROR)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert left_in(files) == before


@pytest.mark.usefixtures("cluster")
def test_two_actors_on_their_gpus_and_a_kill_lose_and_double_nothing(files: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(files, "two.parquet", "actors=2")
    pool = plan_pool(2, cpus=1, parts=8, device="cuda")
    assert pool == Pool(actors=2, cpus=1, threads=1, gpus=1)
    monkeypatch.setattr("cistron_jobs.bulk.run.plan_pool", lambda *_, **__: pool)
    places = files / "places"
    places.mkdir()

    def compute(model: SequenceModel, records: pa.Table) -> pa.Table:
        """Wait until two actors are at work; kill one of them once."""
        [gpu] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        (places / f"gpu{gpu}").touch()
        deadline = time.monotonic() + 120
        while len(list(places.glob("gpu*"))) < 2:
            assert time.monotonic() < deadline, "the second actor never came"
            time.sleep(0.01)
        if "p9" in records["name"].to_pylist() and not (places / "killed").exists():
            (places / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _embedded(model, records, config=settings)

    run_record_job("embed", settings, compute)
    assert left_in(places) == {"gpu0", "gpu1", "killed"}
    assert (files / "two.parquet").read_bytes() == (files / "alone.parquet").read_bytes()
    assert pq.read_table(files / "two.parquet")["name"].to_pylist() == [f"p{i}" for i in range(NUM_PROTEINS)]
