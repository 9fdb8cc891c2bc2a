"""The files of a corpus: Parquet shards of rows, one table of lengths per split, and ``index.json``.

A shard is first written under a name that holds the place of its first row in the input, so whoever writes it need not
know its number: the names sort into the order of the corpus, and ``commit`` numbers them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cistron.data.index import INDEX_FILE, CorpusManifest, Shard, Split
from cistron.data.rows import Row
from cistron.errors import InputError
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


def split_mask(table: pa.Table, *, seed: int, validation_fraction: float) -> NDArray[np.bool_]:
    """Return [rows] true where a row belongs to validation: a hash of seed, record name and start decides."""
    limit = round(validation_fraction * 2**64)
    pairs = zip(table.column("name").to_pylist(), table.column("start").to_pylist(), strict=True)
    return np.array([_hash(f"{seed}:{start}:{name}") < limit for name, start in pairs], dtype=bool)


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
        name_keys=np.array([_hash(name) for name in first.column("name").to_pylist()], dtype=np.uint64),
        bytes=content.size,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def commit(
    folder: str, splits: dict[str, list[WrittenShard]], *, paths: Sequence[str], manifest: dict[str, Any]
) -> None:
    """Number the shards, write the tables of lengths, and last ``index.json``, which makes `folder` a corpus.

    Args:
        folder: where the shards were written.
        splits: the report of every shard.
        paths: path of each input file, by its number.
        manifest: the fields of ``CorpusManifest`` other than `splits`.

    Raises:
        InputError: a split is empty, or a name occurs twice in one file.
    """
    ordered = {name: sorted(shards, key=lambda shard: shard.file) for name, shards in splits.items()}
    for name, shards in ordered.items():
        if not shards:
            raise InputError(f"no row fell into the split {name!r}: change validation_fraction, seed or row_length")
    _check_duplicates([shard for shards in ordered.values() for shard in shards], folder, paths)
    written = {name: _commit_split(folder, name, shards) for name, shards in ordered.items()}
    index = CorpusManifest(splits=written, **manifest)
    storage.write_text(storage.join(folder, INDEX_FILE), index.model_dump_json(indent=2) + "\n")


def _commit_split(folder: str, name: str, shards: list[WrittenShard]) -> Split:
    """Give the shards of one split their final names and write its table of lengths."""
    files = [f"{name}/shard-{number:05d}.parquet" for number in range(len(shards))]
    for shard, file in zip(shards, files, strict=True):
        storage.move(storage.join(folder, shard.file), storage.join(folder, file))
    table = f"{name}/index.parquet"
    lengths = np.concatenate([shard.lengths for shard in shards])
    return Split(
        rows=len(lengths),
        letters=int(lengths.sum()),
        records=sum(len(shard.lines) for shard in shards),
        index=table,
        index_sha256=_write_lengths(storage.join(folder, table), shards),
        shards=tuple(
            Shard(
                file=file,
                rows=len(shard.lengths),
                letters=int(shard.lengths.sum()),
                bytes=shard.bytes,
                sha256=shard.sha256,
            )
            for shard, file in zip(shards, files, strict=True)
        ),
    )


def _write_lengths(path: str, shards: list[WrittenShard]) -> str:
    """Write (shard, row, length) of every row and return the file's SHA-256."""
    rows = [len(shard.lengths) for shard in shards]
    table = pa.table(
        {
            "shard": pa.array(np.repeat(np.arange(len(shards), dtype=np.int32), rows)),
            "row": pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in rows])),
            "length": pa.array(np.concatenate([shard.lengths for shard in shards])),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _check_duplicates(shards: list[WrittenShard], folder: str, paths: Sequence[str]) -> None:
    """Refuse a name that stands twice in one file; other files may use it too, as genomes share `chr1`."""
    files = np.concatenate([shard.file_numbers for shard in shards])
    lines = np.concatenate([shard.lines for shard in shards])
    keys = np.concatenate([shard.name_keys for shard in shards])
    order = np.lexsort((lines, keys, files))
    same = (np.diff(files[order]) == 0) & (np.diff(keys[order]) == 0)
    if same.any():
        place = int(same.argmax())
        first, second = order[place], order[place + 1]
        raise InputError(
            f"{paths[files[first]]}: lines {lines[first]} and {lines[second]} hold records of one name "
            f"({_find_name(shards, folder, int(second))!r}); names must be unique in a file"
        )


def _find_name(shards: list[WrittenShard], folder: str, record: int) -> str:
    """Return the name of record number `record` among those that begin in `shards`."""
    for shard in shards:
        if record < len(shard.lines):
            with storage.open_input(storage.join(folder, shard.file)) as stream:
                table = pq.read_table(stream, columns=["name", "start"])
            return str(table.filter(pc.equal(table.column("start"), 0)).column("name")[record].as_py())
        record -= len(shard.lines)
    raise AssertionError("the record was counted, so it is in a shard")


def _to_table(rows: list[Row], file_number: int) -> pa.Table:
    columns = zip(*((file_number, row.line, row.name, row.start, row.tokens) for row in rows), strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)], schema=ROW_SCHEMA
    )


def _hash(text: str) -> int:
    """Return 64 bits of `text` that are the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
