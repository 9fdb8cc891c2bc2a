"""Small files of a run that are written locally and belong in remote storage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import pyarrow.fs

from cistron.io import storage
from cistron.train.callbacks.callback import Callback, Run

METRICS: Final = "metrics.jsonl"


class Mirror(Callback):
    """A local folder that stands for the run folder; object stores cannot append, so it is copied there now and then.

    For a local run folder it is that folder itself and nothing is copied. What an earlier attempt wrote is fetched at
    once, so that it is appended to. Put it behind the callbacks that write.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._temporary = None if storage.is_local(run_dir) else tempfile.TemporaryDirectory(prefix="cistron-run-")
        self.path = Path(self._temporary.name if self._temporary else storage.resolve(run_dir)[1])
        metrics = storage.join(run_dir, METRICS)
        if self._temporary and storage.exists(metrics):
            (self.path / METRICS).write_bytes(storage.read_bytes(metrics))

    def on_step(self, run: Run) -> None:
        """Copy at each checkpoint."""
        if run.step % run.config.train.checkpoint_every == 0:
            self._copy(run)

    def on_end(self, run: Run) -> None:
        """Copy for the last time."""
        self._copy(run)
        if self._temporary:
            self._temporary.cleanup()

    def _copy(self, run: Run) -> None:
        if self._temporary and run.world.is_main:
            filesystem, path = storage.resolve(self._run_dir)
            pyarrow.fs.copy_files(str(self.path), path, destination_filesystem=filesystem)
