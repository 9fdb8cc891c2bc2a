"""How far a job is: a bar on a terminal, else a line now and then, and one line at the end."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cistron_jobs.bulk.worker import PartReport

logger = logging.getLogger(__name__)

_LINE_EVERY_S: Final = 10.0


@dataclass(slots=True)
class Tally:
    """What a run has done so far; the fields are sums over its reports."""

    started: float = field(default_factory=time.monotonic)
    records: int = 0
    tokens: int = 0
    positions: int = 0
    place: str = ""

    def add(self, report: PartReport) -> None:
        """Count a finished part."""
        self.records += report.records
        self.tokens += report.tokens
        self.positions += report.positions
        self.place = report.place

    @property
    def seconds(self) -> float:
        """Wall time since the run began, starting workers and loading models included."""
        return time.monotonic() - self.started

    def speed(self) -> str:
        """Return the throughput and the share of padding, for people."""
        padding = 1 - self.tokens / self.positions if self.positions else 0.0
        return f"{self.tokens / self.seconds:,.0f} tokens/s, padding {100 * padding:.1f} %"


class ProgressView:
    """Shows the parts of a run as they are finished.

    Args:
        name: of the job.
        total: records of the whole input.
        done: records of the parts that were finished by an earlier run.
    """

    def __init__(self, name: str, *, total: int, done: int) -> None:
        self._name, self._total, self._before = name, total, done
        self._tally = Tally()
        self._shown_at = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(name, total=total, completed=done, note="starting")

    def __enter__(self) -> ProgressView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, report: PartReport) -> None:
        """Show that a part is finished."""
        self._tally.add(report)
        done = self._before + self._tally.records
        if self._bar:
            self._bar.update(self._task, completed=done, note=self._tally.speed())
        elif time.monotonic() - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = time.monotonic()
            logger.info("%s: %s of %s records, %s", self._name, f"{done:,}", f"{self._total:,}", self._tally.speed())

    def summary(self, *, actors: int) -> str:
        """Return the line that ends a run."""
        tally = self._tally
        workers = f"{actors} actor{'s' if actors > 1 else ''}" if actors else "in this process"
        return (
            f"{self._name}: {tally.records:,} records, {tally.tokens:,} tokens in {tally.seconds:.1f} s: "
            f"{tally.speed()}, {workers}, {tally.place}"
        )


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
