"""The files of a corpus: Parquet shards of rows, one table of lengths per split, and ``index.json``.

A shard is first written under a name that holds the place of its first row in the input, so whoever writes it need not
know its number: the names sort into the order of the corpus, and ``commit`` numbers them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cistron.data.hashing import hash_names
from cistron.data.rows import Row
from cistron.io import storage

ROW_SCHEMA = pa.schema(
    [
        pa.field("file", pa.int32(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("tokens", pa.binary(), nullable=False),
    ]
)
"""Rows on their way into shards; `file` and `line` are kept until duplicates are ruled out."""

_STORED_COLUMNS = ["name", "start", "tokens"]
_TABLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What a writer reports of one shard.

    Attributes:
        file: path below the corpus folder; sorts in the order of the corpus.
        lengths: [rows] int64.
        file_numbers, lines, name_keys: [records that begin here] int32, int64, uint64: where each record stands in the
            input, and a hash of its name.
        bytes: size of the file.
        sha256: of the file.
    """

    file: str
    lengths: NDArray[np.int64]
    file_numbers: NDArray[np.int32]
    lines: NDArray[np.int64]
    name_keys: NDArray[np.uint64]
    bytes: int
    sha256: str

    def to_table(self) -> pa.Table:
        """Return the report as one row, the form in which Ray Data carries it."""
        return pa.table({item.name: pa.array([getattr(self, item.name)]) for item in fields(self)})

    @classmethod
    def from_table(cls, table: pa.Table) -> list[WrittenShard]:
        """Return the reports in `table`."""
        columns = {
            name: [value.values.to_numpy() if isinstance(value, pa.ListScalar) else value.as_py() for value in column]
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        return [cls(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def rows_to_tables(rows: Iterable[Row], *, file_number: int, row_bytes: int = 64) -> Iterator[pa.Table]:
    """Gather rows into tables of about 16 MiB."""
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row.tokens) + row_bytes
        if size >= _TABLE_BYTES:
            yield _to_table(held, file_number)
            held, size = [], 0
    if held:
        yield _to_table(held, file_number)


def write_shard(table: pa.Table, *, folder: str, split: str, rows_per_group: int) -> WrittenShard:
    """Write one shard below `folder` and report it; a second attempt replaces the first.

    The folder must exist. A task that outlives a failed job then finds none and leaves nothing behind.
    """
    file_number, line, start = (table.column(name)[0].as_py() for name in ("file", "line", "start"))
    file = f"{split}/part-{file_number:09d}-{line:015d}-{start:015d}.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.select(_STORED_COLUMNS),
        sink,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    content = sink.getvalue()
    file_system, path = storage.resolve(storage.join(folder, file))
    with file_system.open_output_stream(path, compression=None) as stream:
        stream.write(content)
    first = table.filter(pc.equal(table.column("start"), 0))
    return WrittenShard(
        file=file,
        lengths=pc.binary_length(table.column("tokens")).to_numpy().astype(np.int64),
        file_numbers=first.column("file").to_numpy(),
        lines=first.column("line").to_numpy(),
        name_keys=hash_names(first.column("name").to_pylist()),
        bytes=content.size,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _to_table(rows: list[Row], file_number: int) -> pa.Table:
    columns = zip(*((file_number, row.line, row.name, row.start, row.tokens) for row in rows), strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)], schema=ROW_SCHEMA
    )
