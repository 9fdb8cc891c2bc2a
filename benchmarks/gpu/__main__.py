"""The command; see the package."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.report import Row

SECTIONS = {
    "ceilings": "benchmarks.gpu.ceilings",
    "checks": "benchmarks.gpu.checks",
    "kernels": "benchmarks.gpu.kernels",
    "length": "benchmarks.gpu.length",
    "training": "benchmarks.gpu.training",
    "decode": "benchmarks.gpu.decode",
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the sections, print the table, write the record, and return the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="rehearse on the CPU at tiny sizes; measures nothing")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these")
    parser.add_argument("--output", type=Path, help="folder of the record (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the record names, where there is no git")
    options = parser.parse_args(arguments)
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which decides once
    import torch

    if not options.toy and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU is visible; `python -m benchmarks.gpu --toy` rehearses without one")
    return _run(options)


def _run(options: argparse.Namespace) -> list[Row]:
    import torch
    from rich.console import Console

    from benchmarks.gpu import plan, report
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.measure import Clock
    from benchmarks.timing import RESULTS

    chosen = plan.rehearsal() if options.toy else plan.measurement(torch.device("cuda", torch.cuda.current_device()))
    context = Context(chosen, Clock(chosen.device))
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    rows, folder = list[report.Row](), options.output or RESULTS
    for section in _with_their_needs(options.sections):
        start = time.monotonic()
        rows += _section(context, section)
        console.print(f"{section}: {time.monotonic() - start:.0f} s")
        path = report.write(folder, rows, device=chosen.device, rehearsal=options.toy, commit=options.commit)
    title = "A rehearsal at toy sizes: no number means anything" if options.toy else torch.cuda.get_device_name()
    console.print(report.table(rows, title=title), f"recorded in {path}")
    return rows


def _with_their_needs(sections: Sequence[str]) -> list[str]:
    """Return the sections in order; nothing is timed before it is checked."""
    needed = {"ceilings", "checks"} if {*sections} - {"ceilings", "checks"} else set()
    return [section for section in SECTIONS if section in {*sections, *needed}]


def _section(context: Context, name: str) -> list[Row]:
    """Return the rows of a section; what it raises becomes the last one."""
    from benchmarks.gpu.budget import Share
    from benchmarks.gpu.report import Row

    rows: list[Row] = []
    try:
        for row in importlib.import_module(SECTIONS[name]).run(context, Share(context.plan.shares[name])):
            rows.append(row.blank() if context.plan.rehearsal else row)
    except Exception as error:
        trace = traceback.format_exc()
        rows.append(Row(name, name, problem=f"{type(error).__name__}: {error}"[:500], figures={"traceback": trace}))
    return rows


if __name__ == "__main__":
    main()
