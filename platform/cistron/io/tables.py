"""Some columns of a table, row by row, from TSV, CSV or Parquet of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.compressed import open_decompressed
from cistron.io.storage import PathLike

_DELIMITERS: Final = {".tsv": "\t", ".txt": "\t", ".csv": ","}
_PARQUET: Final = ".parquet"
TABLE_SUFFIXES: Final = (*_DELIMITERS, *(f"{suffix}.gz" for suffix in _DELIMITERS), _PARQUET)
"""What the names of tables end in."""


class Column(NamedTuple):
    """A column to read.

    Attributes:
        name: of the column, in lower case.
        type: of its values.
        also: another name that it may have.
        optional: whether a table may lack it; its values are None then.
        blank: whether cells may be empty although the column must be there; their values are None. Those of an
            optional column may be in any case.
    """

    name: str
    type: pa.DataType
    also: str | None = None
    optional: bool = False
    blank: bool = False


def read_rows(path: PathLike, columns: Sequence[Column]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of the columns in each row, in the order of `columns`, whatever theirs in the file.

    Names are found in any case and with a ``#`` before them.

    Raises:
        InputError: no such file, a name that says no known format, a column that is missing, or a value that is missing
            or of another type.
    """
    if not str(path).endswith(TABLE_SUFFIXES):
        raise InputError(f"{path}: tables are read from files named {', '.join(TABLE_SUFFIXES)}")
    number = 0
    for batch in _batches(path, columns):
        for row in batch.to_pylist():
            number += 1
            values = tuple(row.get(column.name) for column in columns)
            for column, value in zip(columns, values, strict=True):
                if value is None and not (column.optional or column.blank):
                    raise InputError(f"{path}, row {number}: {column.name} is missing")
            yield values


def _batches(path: PathLike, columns: Sequence[Column]) -> Iterator[pa.RecordBatch]:
    """Yield the columns that are there under their own names, piece by piece."""
    try:
        if str(path).endswith(_PARQUET):
            with storage.open_input(path) as stream:
                file = pq.ParquetFile(stream)
                found = _found(path, file.schema_arrow.names, columns)
                schema = pa.schema([(column.name, column.type) for column in found.values()])
                for batch in file.iter_batches(columns=list(found)):
                    yield pa.RecordBatch.from_arrays([batch[name] for name in found], schema.names).cast(schema)
        else:
            with _open_csv(path, columns) as (reader, found):
                for batch in reader:
                    yield batch.rename_columns([column.name for column in found.values()])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: {str(error).partition(chr(10))[0]}") from error


@contextmanager
def _open_csv(path: PathLike, columns: Sequence[Column]) -> Iterator[tuple[csv.CSVStreamingReader, dict[str, Column]]]:
    suffix = next(suffix for suffix in _DELIMITERS if str(path).removesuffix(".gz").endswith(suffix))
    parse = csv.ParseOptions(delimiter=_DELIMITERS[suffix])
    with open_decompressed(path) as stream:
        header = stream.readline().decode("utf-8-sig").rstrip("\r\n")
        names = [name.strip('"') for name in header.split(_DELIMITERS[suffix])]
        found = _found(path, names, columns)
        convert = csv.ConvertOptions(
            include_columns=list(found),
            column_types={name: column.type for name, column in found.items()},
            # An allele or contig may be called NA; only nothing is missing.
            null_values=[""],
            strings_can_be_null=True,
        )
        read = csv.ReadOptions(column_names=names)
        yield csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert), found


def _found(path: PathLike, names: Sequence[str], columns: Sequence[Column]) -> dict[str, Column]:
    """Return the columns that are there by the file's own names for them."""
    by_name = {name.lstrip("#").lower(): name for name in names}
    found = {}
    for column in columns:
        spelling = column.name if column.name in by_name or column.also is None else column.also
        if spelling in by_name:
            found[by_name[spelling]] = column
        elif not column.optional:
            raise InputError(f"{path}: there is no column {column.name!r} (found: {', '.join(names)})")
    return found
