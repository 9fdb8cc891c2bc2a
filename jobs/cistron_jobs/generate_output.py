"""Continuations as a file (FASTA, JSON or Parquet) or as a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from textwrap import indent
from typing import Any, Final

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from cistron.io import storage
from cistron.io.fasta import FastaRecord, write_fasta
from cistron_jobs.bulk.fingerprint import Fingerprint
from cistron_jobs.bulk.output import write_parquet

GENERATION_FIELDS: Final = {
    "text": pa.large_string(),
    "token_ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float64()),
    "finish_reason": pa.string(),
}
"""Columns of a generation, beside its prompt's name and sequence."""

_FASTA_SUFFIXES: Final = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")


def known_suffix(path: str) -> str:
    """Return `path` when its name says which kind of file it is; for ``AfterValidator``."""
    if not path.endswith((".json", ".parquet", *_FASTA_SUFFIXES)):
        raise ValueError(f"the name must end in .json, .parquet or one of {', '.join(_FASTA_SUFFIXES)}")
    return path


def write(path: str, tables: Iterable[pa.Table], run: Fingerprint) -> None:
    """Write continuations as what the name of `path` says, one table in memory at a time."""
    if path.endswith(".parquet"):
        write_parquet(path, tables, run)
    elif path.endswith(".json"):
        _write_json(path, _rows(tables))
    else:
        write_fasta(path, map(_completed, _rows(tables)))


def show(generations: pa.Table) -> None:
    """Print continuations."""
    table = Table("prompt", "continuation", "tokens", "mean log p", "ended by")
    table.columns[1].overflow = "fold"
    for row in generations.to_pylist():
        count = len(row["token_ids"])
        mean = f"{sum(row['logprobs']) / count:.3f}" if count else "-"
        table.add_row(row["name"], row["text"], str(count), mean, row["finish_reason"])
    Console().print(table)


def _rows(tables: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        yield from table.to_pylist()


def _write_json(path: str, rows: Iterator[dict[str, Any]]) -> None:
    """Write a list of objects, one after another, as ``json.dumps(list(rows), indent=2)`` would."""
    with storage.open_output(path) as stream:
        separator = "[\n"
        for row in rows:
            stream.write((separator + indent(json.dumps(row, indent=2), "  ")).encode())
            separator = ",\n"
        stream.write(b"\n]\n")


def _completed(row: dict[str, Any]) -> FastaRecord:
    """Return a prompt with its continuation."""
    description = f"prompt={len(row['prompt'])} generated={len(row['token_ids'])}"
    return FastaRecord(row["name"], description, row["prompt"] + row["text"])
