"""The machinery under the jobs, in this process: parts, fingerprints, resuming, joining."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs
from tests.tiny_models import tiny_esm2

from cistron.config import parse_overrides, resolve
from cistron.errors import CapabilityError, ConfigError, InputError
from cistron.io import storage
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import save_checkpoint
from cistron.models.layers.linear import Linear
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.folder import PartsFolder
from cistron_jobs.bulk.pool import PartActor
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.bulk.worker import PartWorker, TokenMeter
from cistron_jobs.embed import EmbedConfig
from cistron_jobs.embed import run as embed

NUM_PROTEINS = 30


class CountConfig(BulkConfig):
    input: str
    output: str
    factor: int = 1


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_esm2(), tmp_path / "esm2")
    write_proteins(tmp_path / "in.faa", NUM_PROTEINS)
    return tmp_path


def write_proteins(path: Path, count: int) -> None:
    draw = random.Random(0)
    letters = ("".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=draw.randint(1, 60))) for _ in range(count))
    path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(letters)))


def config(files: Path, *words: str, cls: type[BulkConfig] = EmbedConfig) -> BulkConfig:
    given = [f"model={files / 'esm2'}", f"input={files / 'in.faa'}", f"output={files / 'out.parquet'}", *words]
    return resolve(cls, parse_overrides(given))


def count_rows(files: Path, *words: str, fail_at: int = -1, total: int = 7) -> list[int]:
    """Run a job that counts to `total` in parts of two; return the first numbers of the parts that it computed."""
    settings = config(files, *words, cls=CountConfig)
    assert isinstance(settings, CountConfig)
    computed = []

    def parts() -> Iterator[pa.Table]:
        for start in range(0, total, 2):
            yield pa.table({"n": list(range(start, min(start + 2, total)))})

    def compute(model: SequenceModel, part: pa.Table) -> pa.Table:
        assert model.family == "esm2"
        numbers = part["n"].to_pylist()
        if fail_at in numbers:
            raise InputError(f"cannot count {fail_at}")
        computed.append(numbers[0])
        return pa.table({"n": [settings.factor * number for number in numbers]})

    run_bulk(settings, BulkJob("count", settings.output, ("input",), parts, compute))
    return computed


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"esm2", "in.faa"}


def test_a_failed_run_goes_on_where_it_stopped(files: Path):
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, fail_at=5)
    assert left_in(files) == {"out.parquet.parts"}
    assert count_rows(files) == [4, 6]
    assert pq.read_table(files / "out.parquet")["n"].to_pylist() == list(range(7))
    assert left_in(files) == {"out.parquet"}


def test_all_parts_finished_but_not_joined(files: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("cistron_jobs.bulk.run._join", broken)
        with pytest.raises(OSError, match="disk full"):
            count_rows(files)
    assert count_rows(files) == []
    assert pq.read_table(files / "out.parquet")["n"].to_pylist() == list(range(7))


@pytest.mark.parametrize(
    ("words", "change_input", "message"),
    [
        (["factor=3"], False, r"factor \(was 1, is 3\); restart=true"),
        (["records_per_part=5"], False, r"records_per_part \(was 1024, is 5\)"),
        ([], True, r"input \(other content\)"),
    ],
)
def test_finished_parts_of_other_settings_are_not_used(files: Path, words: list[str], change_input: bool, message: str):
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, fail_at=5)
    if change_input:
        write_proteins(files / "in.faa", NUM_PROTEINS + 1)
    with pytest.raises(InputError, match=message):
        count_rows(files, *words)
    assert count_rows(files, *words, "restart=true") == [0, 2, 4, 6]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fs.FileSystem]:
    """Pretend that every s3:// URL leads to one object store in memory."""
    memory = MemoryFileSystem(skip_instance_cache=True)
    memory.store.clear()
    store = fs.PyFileSystem(fs.FSSpecHandler(memory))
    monkeypatch.setattr(storage, "_from_url", lambda url: (store, url.partition("://")[2].rstrip("/")))
    yield store
    memory.store.clear()


def test_parts_and_output_in_an_object_store(files: Path, bucket: fs.FileSystem):
    storage.write_bytes("s3://bucket/in.faa", (files / "in.faa").read_bytes())
    words = ["input=s3://bucket/in.faa", "output=s3://bucket/out.parquet"]
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, *words, fail_at=5)
    finished = [storage.name_of(path) for path in storage.list_files("s3://bucket/out.parquet.parts")]
    assert finished == ["part-00000.parquet", "part-00001.parquet", "run.json"]
    assert count_rows(files, *words) == [4, 6]
    assert count_rows(files, *words) == []
    left = [storage.name_of(path) for path in storage.list_files("s3://bucket", recursive=True)]
    assert left == ["in.faa", "out.parquet"]
    with storage.open_input("s3://bucket/out.parquet") as stream:
        assert pq.read_table(stream)["n"].to_pylist() == list(range(7))
    assert left_in(files) == set()


def test_another_model_is_another_run_and_another_place_is_not(files: Path):
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, fail_at=5)
    (files / "esm2").rename(files / "moved")
    save_checkpoint(tiny_esm2(seed=1), files / "esm2")
    with pytest.raises(InputError, match=r"model \(other content\)"):
        count_rows(files)
    assert count_rows(files, f"model={files / 'moved'}", "device=cpu", "cpus_per_actor=1") == [4, 6]


def test_a_finished_output_is_not_computed_again(files: Path, caplog: pytest.LogCaptureFixture):
    assert count_rows(files) == [0, 2, 4, 6]
    with caplog.at_level(logging.INFO):
        assert count_rows(files) == []
    assert "complete already; restart=true" in caplog.text
    assert count_rows(files, "restart=true") == [0, 2, 4, 6]
    assert count_rows(files, "factor=2") == [0, 2, 4, 6]
    assert pq.read_table(files / "out.parquet")["n"].to_pylist() == list(range(0, 14, 2))


def test_a_damaged_part_is_computed_again(files: Path):
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, fail_at=5)
    (files / "out.parquet.parts" / "part-00001.parquet").write_bytes(b"PAR1")
    assert count_rows(files) == [2, 4, 6]


def test_foreign_things_in_the_way_are_kept(files: Path):
    (files / "out.parquet.parts").mkdir()
    (files / "out.parquet.parts" / "mine.txt").write_text("precious")
    for words in ([], ["restart=true"]):
        with pytest.raises(InputError, match=r"out\.parquet\.parts is in the way"):
            count_rows(files, *words)
    assert (files / "out.parquet.parts" / "mine.txt").read_text() == "precious"
    (files / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        count_rows(files, f"output={files / 'folder'}")


def test_a_part_that_kills_its_actors_is_given_up(files: Path):
    folder = PartsFolder(str(files / "out.parquet"))
    folder.claim({}, restart=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"n": pa.int64()})) as stream:
        stream.write_table(pa.table({"n": [1]}))
    block = pa.table({"number": [3], "records": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})

    def compute(model: SequenceModel, part: pa.Table) -> pa.Table:
        raise MemoryError(model.family, part.num_rows)

    worker = PartWorker(config(files, cls=CountConfig), "cpu", compute, folder)
    actor = PartActor(worker, torch.get_num_threads(), Path.cwd())
    for _ in range(4):
        with pytest.raises(MemoryError):
            actor(block)
    with pytest.raises(CapabilityError, match="part 3 has killed its actor 4 times"):
        actor(block)
    folder.claim({}, restart=False)  # A new run tries anew.
    with pytest.raises(MemoryError):
        actor(block)


def test_a_worker_returns_freed_memory_after_each_part(files: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    monkeypatch.setattr("cistron_jobs.bulk.worker.return_freed_memory", lambda: events.append("returned"))
    folder = PartsFolder(str(files / "out.parquet"))
    folder.claim({}, restart=False)

    def compute(model: SequenceModel, part: pa.Table) -> pa.Table:
        events.append("computed")
        return part

    worker = PartWorker(config(files, cls=CountConfig), "cpu", compute, folder).open()
    for number in range(2):
        worker(number, pa.table({"n": [1]}))
    assert events == ["computed", "returned"] * 2


def test_a_worker_reorders_the_weights_once(files: Path):
    folder = PartsFolder(str(files / "out.parquet"))
    folder.claim({}, restart=False)
    copies = []

    def compute(model: SequenceModel, part: pa.Table) -> pa.Table:
        copies.append([layer.reordered for layer in model.modules() if isinstance(layer, Linear)])
        return part

    worker = PartWorker(config(files, cls=CountConfig), "cpu", compute, folder).open()
    for number in range(2):
        worker(number, pa.table({"n": [1]}))
    first, second = copies
    assert first
    assert all(mine is theirs is not None for mine, theirs in zip(first, second, strict=True))


def test_no_records_no_output(files: Path):
    with pytest.raises(InputError, match="count: the input holds no records"):
        count_rows(files, total=0)
    assert left_in(files) == set()


def test_a_gpu_by_number_contradicts_actors(files: Path):
    with pytest.raises(ConfigError, match="device=cuda:1 and actors=2: Ray gives each actor a GPU"):
        config(files, "device=cuda:1", "actors=2")


@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_missing_device_is_not_waited_for(files: Path, device: str):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=f"device: '{device}' is not a device of this machine"):
        count_rows(files, f"device={device}", "actors=1")


def test_cutting_keeps_every_item_within_the_limits():
    draw = random.Random(1)
    for _ in range(50):
        weights = [draw.randint(0, 9) for _ in range(draw.randint(0, 20))]
        max_items, max_weight = draw.randint(1, 5), draw.randint(1, 12)
        parts = list(cut(weights, max_items=max_items, max_weight=max_weight, weight=int))
        assert list(chain.from_iterable(parts)) == weights
        assert all(part and len(part) <= max_items and (len(part) == 1 or sum(part) <= max_weight) for part in parts)
        for part, after in pairwise(parts):  # No part could have taken one more.
            assert len(part) == max_items or sum(part) + after[0] > max_weight


def test_throughput_counts_what_went_through_the_model(files: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_esm2()
    meter = TokenMeter(model)
    ids = model.tokenizer.encode("MKTAY")
    batch = torch.from_numpy(ids).repeat(3, 1)
    model(batch)
    model(batch, attention_mask=batch != ids[1])
    assert meter.take() == (3 * 7 + 3 * 6, 6 * 7)
    assert meter.take() == (0, 0)
    with caplog.at_level(logging.INFO):
        embed(config(files, "token_budget=1", "records_per_part=4"))
    letters = sum(len(line) for line in (files / "in.faa").read_text().splitlines() if line[0] != ">")
    assert f"embed: {NUM_PROTEINS} records, {letters + 2 * NUM_PROTEINS:,} tokens in " in caplog.text
    assert "padding 0.0 %, in this process" in caplog.text


def test_progress_in_a_log_and_on_a_terminal(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(InputError, match="cannot count 5"):
        count_rows(files, fail_at=5)
    monkeypatch.setattr("cistron_jobs.bulk.progress._LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        count_rows(files)
    assert "count: 2 of 4 parts were finished before" in caplog.text
    assert "count: 6 of 7 records, 0 tokens/s" in caplog.text  # Counting does not run the model.
    assert "count: 3 records, 0 tokens in " in caplog.text
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    count_rows(files, "restart=true")
    assert "7/7" in capsys.readouterr().err


def test_sigkill_and_the_same_command_again(files: Path):
    """Killed hard with some parts finished, the job ends with the very file of a run that was left alone."""
    write_proteins(files / "in.faa", 120)
    command = f"from cistron_jobs.cli import main; main({['embed', *words_of(files)]!r})"
    process = subprocess.Popen([sys.executable, "-c", command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = files / "out.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.parquet"))) < 3:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    assert 3 <= len(finished) < 120
    assert json.loads((parts / "run.json").read_text())["job"] == "embed"
    embed(config(files, *words_of(files)))
    assert left_in(files) == {"out.parquet"}
    resumed = (files / "out.parquet").read_bytes()
    embed(config(files, *words_of(files), "restart=true"))
    assert (files / "out.parquet").read_bytes() == resumed
    assert pq.read_table(files / "out.parquet")["name"].to_pylist() == [f"p{i}" for i in range(120)]


def words_of(files: Path) -> list[str]:
    given = [f"model={files / 'esm2'}", f"input={files / 'in.faa'}", f"output={files / 'out.parquet'}"]
    return [*given, "records_per_part=1", "actors=0"]
