"""The table of ops that are checked and timed."""

from __future__ import annotations

from functools import cache

from benchmarks.gpu.cases import hyena, mixing, rows, steps
from benchmarks.gpu.cases.case import Case, Family, Work


@cache
def all_cases() -> dict[str, Case]:
    """Return every case by name, in the order of the table."""
    found = [*rows.cases(), *mixing.cases(), *hyena.cases(), *steps.cases()]
    return {case.name: case for case in found}


def run_by(family: Family, work: Work) -> list[str]:
    """Return the names of the cases that a family's models run."""
    return [case.name for case in all_cases().values() if case.family == family and work in case.works]
