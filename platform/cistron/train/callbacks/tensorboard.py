"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cistron.train.callbacks.callback import Callback, Run
from cistron.train.metrics import Metrics


class TensorBoardWriter(Callback):
    """Writes every number of every record on rank 0, as ``train/...`` and ``valid/...``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def on_start(self, run: Run) -> None:
        """Open the event file; TensorBoard hides older events from the first step on."""
        if run.world.is_main:
            self._writer = SummaryWriter(str(self._folder), purge_step=run.step + 1)

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Write one record."""
        self._write("train", {k: v for k, v in metrics.to_json().items() if k != "step" and v is not None}, run.step)

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Write the held-out losses."""
        self._write("valid", {name.removeprefix("valid_"): value for name, value in values.items()}, run.step)

    def on_end(self, run: Run) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()
