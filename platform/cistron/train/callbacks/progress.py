"""Progress in the terminal of whoever started the run.

Workers run elsewhere and their output arrives prefixed and interleaved, so rank 0 sends its records to a small actor
beside the driver, and a thread of the driver draws them: a bar on a terminal, else a line now and then.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cistron.train.callbacks.callback import Callback, Run
from cistron.train.metrics import Metrics

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_LINE_EVERY_S: Final = 10.0


class Board:
    """The newest record; an actor of its own, so that neither side waits for the other."""

    def __init__(self) -> None:
        self._record: dict[str, Any] = {}

    def post(self, record: Mapping[str, Any]) -> None:
        """Lay `record` over what is known."""
        self._record.update(record)

    def read(self) -> dict[str, Any]:
        """Return what is known."""
        return dict(self._record)


class Reporter(Callback):
    """Sends rank 0's records to the board without waiting for it."""

    def __init__(self, board: ray.actor.ActorHandle[Board]) -> None:
        self._board = board

    def on_start(self, run: Run) -> None:
        """Show where the run begins."""
        self._post(run, {"step": run.step})

    def on_metrics(self, run: Run, metrics: Metrics) -> None:
        """Show the newest record."""
        self._post(run, metrics.to_json())

    def on_evaluation(self, run: Run, values: Mapping[str, float]) -> None:
        """Show the held-out loss."""
        self._post(run, {"step": run.step, **values})

    def _post(self, run: Run, record: Mapping[str, Any]) -> None:
        if run.world.is_main:
            self._board.post.remote(dict(record))


class View(Protocol):
    """Draws records."""

    def show(self, record: Mapping[str, Any]) -> None:
        """Draw `record`."""
        ...

    def close(self) -> None:
        """Leave the terminal clean."""
        ...


class BarView:
    """A bar that stays in place."""

    def __init__(self, title: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=total, note="")
        self._progress.start()

    def show(self, record: Mapping[str, Any]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=record["step"], note=describe(record))

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()


class LineView:
    """One line of the log every few seconds, and one for the last record."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._last: Mapping[str, Any] = {}
        self._shown_step: int | None = None
        self._shown_at = -_LINE_EVERY_S

    def show(self, record: Mapping[str, Any]) -> None:
        """Log `record` unless another one has just been logged."""
        self._last = record
        if "loss" in record and time.monotonic() - self._shown_at >= _LINE_EVERY_S:
            self._log()

    def close(self) -> None:
        """Log the last record if it has not been."""
        if "loss" in self._last:
            self._log()

    def _log(self) -> None:
        step = self._last["step"]
        if step != self._shown_step:
            logger.info("%s: step %d of %d, %s", self._title, step, self._total, describe(self._last))
        self._shown_step, self._shown_at = step, time.monotonic()


def describe(record: Mapping[str, Any]) -> str:
    """Return the numbers of a record that a person watches.

    >>> describe({"step": 3, "loss": 1.25, "tokens_per_second": 1234.5, "mfu": 0.41})
    'loss 1.250, 1,234 tokens/s, MFU 41.0 %'
    """
    formats = {
        "loss": "loss {:.3f}",
        "valid_loss": "valid {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
    }
    parts = (text.format(record[key]) for key, text in formats.items() if record.get(key) is not None)
    return ", ".join(parts).replace("%", " %")


@contextmanager
def terminal_progress(title: str, *, total: int) -> Iterator[ray.actor.ActorHandle[Board]]:
    """Draw what is posted on the yielded board until the block ends."""
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()
    view: View = BarView(title, total) if sys.stderr.isatty() else LineView(title, total)
    thread = threading.Thread(target=_follow, args=(board, view, stop), name="cistron-progress", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        view.close()
        ray.kill(board)


def _follow(board: Any, view: View, stop: threading.Event) -> None:
    while True:
        last = stop.wait(_POLL_S)
        try:
            record: dict[str, Any] = ray.get(board.read.remote(), timeout=10)
        except ray.exceptions.RayError:  # The cluster is going away; the run's own error says why.
            return
        if record:
            view.show(record)
        if last:
            return
