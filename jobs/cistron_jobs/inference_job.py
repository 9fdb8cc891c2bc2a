"""What the jobs over the records of a FASTA file share: their settings, and the file cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import pyarrow as pa
from pydantic import PositiveInt

from cistron.inference.batching import TOKEN_BUDGET, length_limit
from cistron.io.fasta import FastaRecord, read_fasta
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.output import ParquetPath
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.bulk.worker import Compute
from cistron_jobs.model_config import ModelJobConfig, model_shell

Check: TypeAlias = Callable[[str, str], None]
"""Raises the error of a validated sequence that a job cannot use; its second argument is the place in the file."""


class RecordJobConfig(BulkConfig):
    """A model that runs over the records of a FASTA file into a Parquet table."""

    input: str
    """FASTA file, plain or compressed; a path or URL."""
    output: ParquetPath
    """Parquet file to write; a path or URL, in reach of every actor. It appears when all of it is written; until then
    finished parts lie in <output>.parts, from where the same command goes on after a kill."""
    token_budget: PositiveInt = TOKEN_BUDGET
    """Most tokens of one forward pass, padding included."""


def run_record_job(name: str, config: RecordJobConfig, compute: Compute, check: Check | None = None) -> None:
    """Run `compute` over the records of the input, which come as columns name and sequence.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    parts = partial(_parts, config, check)
    run_bulk(config, BulkJob(name, config.output, ("input",), parts, compute))


def _parts(config: RecordJobConfig, check: Check | None) -> Iterator[pa.Table]:
    """Yield the validated records of the input, one table per part."""
    for records in cut(
        checked_records(config, config.input, check),
        max_items=config.records_per_part,
        max_weight=config.letters_per_part,
        weight=lambda record: len(record.sequence),
    ):
        yield records_table(records)


def checked_records(
    config: ModelJobConfig, path: str, check: Check | None = None, *, limited: bool = True
) -> Iterator[FastaRecord]:
    """Yield the records of a FASTA file as the model reads them; one that it cannot read is named with its line.

    Records longer than the model's context pass when they are not `limited`.

    Raises:
        SequenceError: a letter outside the model's alphabet, or a sequence longer than the model reads.
        InputError: a file that is not FASTA.
    """
    model = model_shell(config)
    limit = length_limit(model) if limited else None
    for record in read_fasta(path):
        place = f"{path}, line {record.line}, record {record.name!r}"
        sequence = model.tokenizer.validate(record.sequence, name=place, max_length=limit)
        if check is not None:
            check(sequence, place)
        yield FastaRecord(record.name, record.description, sequence, record.line)


def records_table(records: list[FastaRecord]) -> pa.Table:
    """Return the names and sequences of records as a table."""
    # large_string: a part of long sequences, such as chromosomes, may hold more than 2^31 letters.
    sequences = pa.array([record.sequence for record in records], pa.large_string())
    return pa.table({"name": pa.array([record.name for record in records], pa.string()), "sequence": sequences})
