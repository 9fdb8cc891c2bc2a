"""The table and the record."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from benchmarks.timing import processor

PACKAGES: Final = ("cistron", "torch", "triton", "liger-kernel", "fla-core", "causal-conv1d")
_REPOSITORY: Final = Path(__file__).parents[2]
WIDTH: Final = 160
"""Columns of the table where the terminal does not say."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        section: the part of the benchmark it belongs to.
        what: what was measured.
        size: at which size.
        shown: the measurement, for readers.
        share: of the ceiling.
        beside: how many times faster than others.
        asked: the goal.
        met: whether it was reached; None without a goal.
        problem: why there is no measurement, or what is wrong with it.
        contenders: why each form of an op has no time, empty where it has one; a rehearsal keeps these.
        figures: all numbers, for the record.
    """

    section: str
    what: str
    size: str = ""
    shown: str = ""
    share: str = ""
    beside: str = ""
    asked: str = ""
    met: bool | None = None
    problem: str = ""
    contenders: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def blank(self) -> Row:
        """Return the row of a rehearsal: whatever was done, without a number."""
        shown = "" if self.problem else "rehearsed"
        return replace(self, shown=shown, share="", beside="", met=None, figures={})

    def cells(self) -> list[str]:
        """Return the table's cells."""
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return [self.what, self.size, self.problem or self.shown, self.share, self.beside, self.asked, met]


def table(rows: Iterable[Row], *, title: str) -> Table:
    """Return the table, a part per section."""
    drawn = Table("what", "size", "measured", "of ceiling", "times faster than", "asked", "met", title=title,
                  title_justify="left")  # fmt: skip
    for _, section in groupby(rows, key=lambda row: row.section):
        for row in section:
            drawn.add_row(*row.cells())
        drawn.add_section()
    return drawn


def write(folder: Path, rows: Iterable[Row], *, device: torch.device, rehearsal: bool, commit: str | None) -> Path:
    """Write the record and return its path: `gpu-<device>.json`, or `gpu-rehearsal.json`."""
    record = {
        "benchmark": "gpu",
        "kind": "rehearsal" if rehearsal else "measurement",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": _machine(device),
        "versions": _versions(),
        "rows": [asdict(row) for row in rows],
    }
    name = "rehearsal" if rehearsal else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{name}.json"
    path.write_text(json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _asked("driver_version"),
        "power_limit": _asked("power.limit"),
        "largest_clock": _asked("clocks.max.sm"),
    }


def _asked(field_name: str) -> str:
    """Return what the driver's tool says of the GPU, without changing anything."""
    return _output("nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit, marked where files differ from it."""
    commit = _output("git", "-C", str(_REPOSITORY), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(_REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed not in ("", "unknown") else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
