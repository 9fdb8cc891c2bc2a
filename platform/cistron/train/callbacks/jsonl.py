"""metrics.jsonl: one JSON object per record, kept free of steps that a restart will repeat."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cistron.io import storage
from cistron.train.callbacks.callback import Callback, Run
from cistron.train.metrics import Metrics


class JsonlWriter(Callback):
    """Appends every record on rank 0, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, run: Run) -> None:
        """Drop records of steps after the checkpoint: they are about to be taken again."""
        if not run.world.is_main or not self._path.exists():
            return
        lines = self._path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= run.step]
        storage.write_text(self._path, "".join(f"{line}\n" for line in kept))

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Write one record."""
        self._append(run, metrics.to_json())

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Write the held-out losses as a record of their own."""
        self._append(run, {"step": run.step, **values})

    def _append(self, run: Run, record: Mapping[str, Any]) -> None:
        if not run.world.is_main:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as stream:
            stream.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")


def _step_of(line: str) -> float:
    """Return a record's step; a torn last line, left by a kill, counts as never."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
