"""The README's cluster path: `ray job submit -- cistron ...` against a running cluster with a dashboard."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; below 10000, because Ray gives 10002 to 19999 to its workers."""
    ports = []
    for port in range(8100 + os.getpid() % 500, 9900):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of a one-node cluster started as `ray start --head` starts it; only its own processes are stopped."""
    temp = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # Unix socket paths are short.
    gcs, dash, agent, metrics, client = free_ports(5)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=8", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", f"--dashboard-port={dash}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={temp}"),
        *("--object-store-memory=300000000", "--disable-usage-stats"),
    ]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # Nothing to drain; do not linger for half a minute.
    with (temp / "start.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{dash}"
    try:
        wait_until_up(f"{url}/api/version", process, temp / "start.log")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"{url} did not answer: {log.read_text()}")


def submit(dashboard: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--", "cistron", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_prepare_and_pretrain_run_as_jobs(dashboard: str, tmp_path: Path):
    sample = ROOT / "jobs" / "cistron_jobs" / "sample_data" / "lambda_phage.fna.gz"
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    done = submit(
        dashboard,
        "prepare_data",
        f"input={sample}",
        f"output={corpus}",
        "alphabet=dna",
        "row_length=4096",
        "validation_fraction=0.3",
    )
    assert done.returncode == 0, done.stdout + done.stderr

    config = ROOT / "jobs" / "configs" / "pretrain-evo2_tiny-demo-1n0g-fsdp2.yaml"
    words = [str(config), f"data.path={corpus}", "train.steps=2", f"run_dir={run}"]
    done = submit(dashboard, "pretrain", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "summary.json").exists()
    assert (run / "export" / "model.safetensors").exists()


def test_a_refused_job_fails_and_says_why(dashboard: str, tmp_path: Path):
    done = submit(dashboard, "pretrain", "model=evo2_tinny", f"data.path={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert "evo2_tinny" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
