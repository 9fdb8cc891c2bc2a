"""The table of ops that are checked and timed."""

from __future__ import annotations

from functools import cache

from benchmarks.gpu.cases import hyena, mixing, rows, steps
from benchmarks.gpu.cases.case import Case


@cache
def all_cases() -> dict[str, Case]:
    """Return every case by name, in the order of the table."""
    found = [*rows.cases(), *mixing.cases(), *hyena.cases(), *steps.cases()]
    return {case.name: case for case in found}
