"""What the jobs over the records of a FASTA file share: their settings, and the file cut into parts.

Two records may have one name, as in files that were joined. Both keep their rows, which their numbers tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import PositiveInt

from cistron.data.hashing import hash_names
from cistron.inference.batching import TOKEN_BUDGET, length_limit
from cistron.io.fasta import FastaRecord, read_fasta
from cistron.models.base import SequenceModel
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.output import ParquetPath
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.bulk.worker import Compute
from cistron_jobs.model_config import ModelJobConfig, model_shell
from cistron_jobs.repeated_names import warn_of_repeated_names

Check: TypeAlias = Callable[[str, str], None]
"""Raises the error of a validated sequence that a job cannot use; its second argument is the place in the file."""


class RecordJobConfig(BulkConfig):
    """A model that runs over the records of a FASTA file into a Parquet table."""

    input: str
    """FASTA file, plain or compressed; a path or URL."""
    output: ParquetPath
    """Parquet file to write; a path or URL, in reach of every actor. It appears when all of it is written; until then
    finished parts lie in <output>.parts, from where the same command goes on after a kill. Its first column is record,
    the number of the input record, from 0."""
    token_budget: PositiveInt = TOKEN_BUDGET
    """Most tokens of one forward pass, padding included."""


def run_record_job(name: str, config: RecordJobConfig, compute: Compute, check: Check | None = None) -> None:
    """Run `compute` over the records of the input, which come as columns name and sequence.

    The output begins with a column record; names that the input repeats are logged before anything is computed.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    parts = RecordParts(name, config, check)
    run_bulk(config, BulkJob(name, config.output, ("input",), parts, partial(_numbered, compute=compute)))


class RecordParts:
    """The validated records of the input, one table with columns record, name and sequence per part.

    Parts are read again wherever they are computed. The first reading, in the program itself, looks at the names.
    """

    def __init__(self, job: str, config: RecordJobConfig, check: Check | None) -> None:
        self._job, self._config, self._check = job, config, check
        self._names_are_known = False

    def __call__(self) -> Iterator[pa.Table]:
        """Yield the parts."""
        hashes: list[NDArray[np.uint64]] = []
        for numbers, records in self._cut():
            if not self._names_are_known:
                hashes.append(hash_names(record.name for record in records))
            yield records_table(records).add_column(0, "record", pa.array(numbers, pa.int64()))
        if hashes:
            warn_of_repeated_names(self._job, self._config.input, np.concatenate(hashes))
        self._names_are_known = True

    def _cut(self) -> Iterator[tuple[range, list[FastaRecord]]]:
        """Yield the numbers and the records of each part."""
        start = 0
        for records in cut(
            checked_records(self._config, self._config.input, self._check),
            max_items=self._config.records_per_part,
            max_weight=self._config.letters_per_part,
            weight=lambda record: len(record.sequence),
        ):
            yield range(start, start + len(records)), records
            start += len(records)


def _numbered(model: SequenceModel, records: pa.Table, *, compute: Compute) -> pa.Table:
    """Compute a part and put the records' numbers before its columns."""
    return compute(model, records.drop_columns(["record"])).add_column(0, "record", records["record"])


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
