from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from cistron import score_sequences
from cistron.config import resolve
from cistron.errors import CheckpointNotFoundError, ConfigError, UnknownNameError
from cistron.models.checkpoint import save_checkpoint
from cistron.models.registry import build_model
from cistron_jobs.serve import ServeJobConfig, run


def test_one_model_is_named_by_its_folder(tmp_path: Path) -> None:
    config = resolve(ServeJobConfig, {"model": str(tmp_path / "my_model")})
    assert list(config.serve_config().models) == ["my_model"]
    several = resolve(ServeJobConfig, {"models": {"a": "x", "b": {"source": "y", "num_replicas": 3}}})
    assert list(several.serve_config().models) == ["a", "b"]
    assert several.serve_config().num_cpus() == 5
    with pytest.raises(ConfigError, match="'my model' cannot be an identifier"):
        resolve(ServeJobConfig, {"model": str(tmp_path / "my model")}).serve_config()


@pytest.mark.parametrize("settings", [{}, {"model": "x", "models": {"a": "y"}}])
def test_exactly_one_way_to_name_models(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="give either model="):
        resolve(ServeJobConfig, settings)


def test_what_cannot_be_served_fails_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        run(resolve(ServeJobConfig, {"model": str(tmp_path / "nothing")}))
    with pytest.raises(CheckpointNotFoundError):
        run(resolve(ServeJobConfig, {"model": str(tmp_path)}))
    with pytest.raises(UnknownNameError, match="did you mean 'evo2_7b'"):
        run(resolve(ServeJobConfig, {"model": "evo2_7B_"}))


@pytest.mark.ray
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    model = build_model("esm2_tiny")
    model.init_weights(seed=0)
    save_checkpoint(model, tmp_path / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", f"model={tmp_path / 'tiny'}", f"port={port}"]
    # RAY_ADDRESS=local: another cluster on this machine is not ours to use.
    environment = os.environ | {"RAY_ADDRESS": "local"}
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "cistron_jobs.cli", *words],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until_ready(client, process, log)
            answer = client.post("/v1/score", json={"model": "tiny", "sequences": ["MKTAYIAK"]}).json()
        assert answer["scores"][0]["score"] == pytest.approx(
            score_sequences(model.eval(), ["MKTAYIAK"])[0].score, rel=1e-5
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert f"serving tiny at http://127.0.0.1:{port}" in log.read_text()
    deadline = time.monotonic() + 20
    while left := members(process.pid):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.2)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/v1/health/ready").status_code == 200 and "serving tiny at" in log.read_text():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not ready: {log.read_text()}")


def members(session: int) -> list[int]:
    """Live processes of a session, from /proc; Ray's workers stay in the session of the program that started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found
