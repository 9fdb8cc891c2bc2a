"""`python -m benchmarks [name ...]`: run all or some, print a table each, and write the records."""

from __future__ import annotations

import importlib
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.timing import write_record

BENCHMARKS = (
    "contact_memory",
    "cpu_ops",
    "decode",
    "embed_job",
    "esm2_throughput",
    "exactness",
    "long_convolution",
    "scoring_memory",
    "variant_prefix",
)


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all of them."""
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"error: unknown benchmarks {sorted(unknown)} (known: {', '.join(BENCHMARKS)})")
    for name in names or BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.run()
        table = Table(*rows[0], title=module.__doc__, title_justify="left")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table, f"recorded in {write_record(name, rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
