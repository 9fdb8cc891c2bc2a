"""`cistron embed` with ESM-2's 8M shape: by one actor, killed and resumed, then by two; the outputs must be equal.

CISTRON_PROTEINS names a FASTA file to embed instead of the packaged sample. Every actor computes with one thread, so
that one and two round alike.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from benchmarks.proteins import proteins_file
from cistron.io.fasta import read_fasta
from cistron.models.checkpoint import save_checkpoint
from cistron.models.registry import build_model

MODEL: Final = "esm2_8m"
RECORDS_PER_PART: Final = 256
PARTS_BEFORE_THE_KILL: Final = 3
_RATE: Final = re.compile(r"in ([\d.,]+) s: ([\d,]+) tokens/s, padding ([\d.]+) %")


def run() -> list[dict[str, Any]]:
    """Return one row per way of running; a lost, doubled or different row is an error."""
    source = proteins_file()
    names = [record.name for record in read_fasta(source)]
    with tempfile.TemporaryDirectory(prefix="cistron-") as folder:
        model = build_model(MODEL)
        model.init_weights(seed=0)
        save_checkpoint(model, Path(folder) / "model")
        resumed, two = Path(folder) / "resumed.parquet", Path(folder) / "two.parquet"
        kept = _killed(_command(source, resumed, actors=1), resumed)
        rows = [
            {
                "run": f"one actor, resumed after a kill, {kept} parts kept",
                **_finished(_command(source, resumed, actors=1)),
            },
            {"run": "two actors", **_finished(_command(source, two, actors=2))},
        ]
        if pq.read_table(resumed, columns=["name"])["name"].to_pylist() != names:
            raise AssertionError(f"the output's rows are not the {len(names)} records of {source} in their order")
        if resumed.read_bytes() != two.read_bytes():
            raise AssertionError("two actors wrote another file than one that was killed and resumed")
    return [{**row, "records": len(names), "equal": True} for row in rows]


def _command(source: Path, output: Path, *, actors: int) -> list[str]:
    settings = {
        "model": output.parent / "model",
        "input": source,
        "output": output,
        "precision": "fp32",
        "actors": actors,
        "records_per_part": RECORDS_PER_PART,
        "cpus_per_actor": 1,
    }
    cistron = str(Path(sys.executable).with_name("cistron"))
    return [cistron, "embed", *(f"{name}={value}" for name, value in settings.items())]


def _killed(command: list[str], output: Path) -> int:
    """Start the job, kill it after a few parts, and return how many it has left."""
    parts = Path(f"{output}.parts")
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(parts.glob("*.parquet"))) < PARTS_BEFORE_THE_KILL:
        time.sleep(0.2)
    if process.poll() is not None:
        raise AssertionError(f"embed ended before it was killed, with {process.returncode}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(parts.glob("*.parquet")))


def _finished(command: list[str]) -> dict[str, Any]:
    """Run the job to its end and return what its last line says."""
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    found = _RATE.search(done.stdout + done.stderr)
    if done.returncode or found is None:
        raise AssertionError(f"embed failed: {done.stderr}")
    seconds, rate, padding = (float(number.replace(",", "")) for number in found.groups())
    return {"seconds": seconds, "tokens_per_second": round(rate), "padding_percent": padding}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
