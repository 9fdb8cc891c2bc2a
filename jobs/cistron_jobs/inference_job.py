"""What the jobs that run a model over sequences share: settings, records in batches, and a table that grows on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count, islice
from typing import Annotated, Final, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import AfterValidator, PositiveInt

from cistron.config import Config
from cistron.errors import ConfigError, InputError
from cistron.inference.batching import TOKEN_BUDGET, length_limit
from cistron.io import storage
from cistron.io.fasta import FastaRecord, read_fasta
from cistron.models.base import SequenceModel
from cistron.models.registry import Precision, load_model

logger = logging.getLogger(__name__)

_LOG_EVERY_BATCHES: Final = 10


def _is_parquet(path: str) -> str:
    if not path.endswith(".parquet"):
        raise ValueError("the output is a Parquet file, so its name must end in .parquet")
    return path


ParquetPath: TypeAlias = Annotated[str, AfterValidator(_is_parquet)]


class ModelJobConfig(Config):
    """Which model runs, where and how."""

    model: str
    """Native checkpoint (folder or URL), or a registry name whose weights are on disk."""
    device: str = "auto"
    """Where the model runs: auto (a GPU when there is one), cpu, cuda or cuda:1."""
    precision: Precision = "auto"
    """auto keeps the weights as stored and refuses models known to degrade so; bf16 and fp32 run so regardless."""


class RecordJobConfig(ModelJobConfig):
    """A model that runs over the records of a FASTA file into a Parquet table."""

    input: str
    """FASTA file, plain or compressed; a path or URL."""
    output: ParquetPath
    """Parquet file to write; a path or URL. It appears when all of it is written."""
    token_budget: PositiveInt = TOKEN_BUDGET
    """Most tokens of one forward pass, padding included."""
    records_per_batch: PositiveInt = 1024
    """Records in memory at once; a row group of the output."""


def open_model(config: ModelJobConfig) -> SequenceModel:
    """Load the model of a job.

    Raises:
        ConfigError: a device that does not exist.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {config.device!r} is not a device of this machine ({reason})") from error
    return load_model(config.model, device=device, precision=config.precision)


def open_record_job(config: RecordJobConfig) -> tuple[SequenceModel, Iterator[list[FastaRecord]]]:
    """Load the model and open the input, which is looked for first because loading takes long."""
    if not storage.exists(config.input):
        raise InputError(f"input: no such file: {config.input}")
    model = open_model(config)
    return model, record_batches(config.input, model, size=config.records_per_batch)


def record_batches(path: str, model: SequenceModel, *, size: int) -> Iterator[list[FastaRecord]]:
    """Yield the records of a FASTA file in batches; a record that the model cannot read is named with its line."""
    records = read_fasta(path)
    limit = length_limit(model)
    done = 0
    for number in count(1):
        batch = list(islice(records, size))
        if not batch:
            logger.info("%s: all %s records done", path, f"{done:,}")
            return
        for record in batch:
            place = f"{path}, line {record.line}, record {record.name!r}"
            model.tokenizer.validate(record.sequence, name=place, max_length=limit)
        yield batch
        done += len(batch)
        if number % _LOG_EVERY_BATCHES == 0:
            logger.info("%s: %s records done", path, f"{done:,}")


def write_parquet(path: str, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema as row groups of a file that appears when all are written; return the rows."""
    rows = 0
    with storage.open_output(path) as stream, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            writer = writer or stack.enter_context(pq.ParquetWriter(stream, table.schema))
            writer.write_table(table)
            rows += table.num_rows
    return rows
