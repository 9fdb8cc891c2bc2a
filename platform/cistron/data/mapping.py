"""Which protein belongs to which cluster: UniRef90 members of UniRef50 clusters, or any other two levels.

A mapping is a table of pairs. As text, one pair in each line: cluster id, tab, member id, which is what MMseqs2 writes
(plain or gzip; empty lines and those that begin with ``#`` do not count). As Parquet, a column of cluster ids and one
of member ids, in which a row may also hold a list of members. The sequences' own Parquet files will do, if they have
both columns.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.compressed import open_decompressed

CLUSTER_COLUMN: Final = "ur50_id"
MEMBER_COLUMN: Final = "ur90_id"

_BATCH_PAIRS: Final = 1 << 16
_PARQUET_MAGIC: Final = b"PAR1"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some lines of a mapping.

    Attributes:
        path: the file.
        lines: [pairs] int64, line of the text or row of the Parquet file, from 1.
        clusters: [pairs] ids of the clusters.
        members: [pairs] ids of the members.
    """

    path: str
    lines: NDArray[np.int64]
    clusters: pa.StringArray
    members: pa.StringArray


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where the pairs are written down.

    Attributes:
        paths: files, text or Parquet.
        cluster_column: Parquet column of the clusters' ids.
        member_column: Parquet column of the members' ids.
    """

    paths: tuple[str, ...]
    cluster_column: str = CLUSTER_COLUMN
    member_column: str = MEMBER_COLUMN

    def read(self) -> Iterator[Pairs]:
        """Yield all pairs in order, some at a time.

        Raises:
            InputError: a file is missing, damaged or malformed, or a cluster has no member; names the line.
        """
        for path in self.paths:
            with storage.open_input(path) as stream:
                is_parquet = stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
            for pairs in _read_parquet(path, self) if is_parquet else _read_text(path):
                _check_ids(pairs)
                yield pairs

    def describe(self, pair: int) -> tuple[str, str, str]:
        """Return place ("file, line 7"), cluster and member of pair number `pair`; for messages, as it reads anew."""
        for pairs in self.read():
            if pair < len(pairs.lines):
                place = f"{pairs.path}, line {pairs.lines[pair]}"
                return place, pairs.clusters[pair].as_py(), pairs.members[pair].as_py()
            pair -= len(pairs.lines)
        raise AssertionError("the pair was counted, so it is in the mapping")


def _read_text(path: str) -> Iterator[Pairs]:
    """Read pairs of a text file."""
    entries = (_split_line(path, number, line) for number, line in _text_lines(path))
    while batch := list(islice(entries, _BATCH_PAIRS)):
        lines, clusters, members = zip(*batch, strict=True)
        yield Pairs(path, np.array(lines), pa.array(clusters), pa.array(members))


def _text_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the lines that hold a pair."""
    number = 0
    try:
        with open_decompressed(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip() and not line.startswith(b"#"):
                    yield number, line.strip(b"\r\n")
    except EOFError as error:
        raise InputError(f"{path}, line {number + 1}: the compressed file is cut short here") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, line {number + 1}: the compressed file is damaged ({error})") from error


def _split_line(path: str, number: int, line: bytes) -> tuple[int, str, str]:
    fields = line.decode("utf-8", errors="replace").split("\t")
    if len(fields) != 2:
        raise InputError(
            f"{path}, line {number}: a mapping has two columns, cluster id, tab, member id; "
            f"this line has {len(fields)}: {line[:60].decode('utf-8', errors='replace')!r}"
        )
    return number, fields[0].strip(), fields[1].strip()


def _read_parquet(path: str, mapping: Mapping) -> Iterator[Pairs]:
    """Read pairs of a Parquet file; a row with a list of members is several."""
    columns = [mapping.cluster_column, mapping.member_column]
    with storage.open_input(path) as stream:
        try:
            file = pq.ParquetFile(stream)
            _check_columns(path, file.schema_arrow, columns)
            first = 1
            for batch in file.iter_batches(_BATCH_PAIRS, columns=columns):
                lines = np.arange(first, first + len(batch))
                yield _flatten(path, lines, *(batch.column(name) for name in columns))
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged Parquet file ({error})") from error


def _check_columns(path: str, schema: pa.Schema, columns: Sequence[str]) -> None:
    settings = ("cluster_column", "member_column")
    for setting, column in zip(settings, columns, strict=True):
        if column not in schema.names:
            raise InputError(f"{path}: no column {column!r} (has: {', '.join(schema.names)}); set {setting}")
        kind = schema.field(column).type
        nested = setting == "member_column" and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or nested):
            raise InputError(f"{path}: column {column!r} holds {kind}; ids are text")


def _flatten(path: str, lines: NDArray[np.int64], clusters: pa.Array, members: pa.Array) -> Pairs:
    """Give each member of a list its own pair."""
    if pa.types.is_list(members.type) or pa.types.is_large_list(members.type):
        empty = pc.fill_null(pc.equal(pc.list_value_length(members), 0), True).to_numpy(zero_copy_only=False)
        if empty.any():
            place = int(empty.argmax())
            raise InputError(f"{path}, line {lines[place]}: cluster {clusters[place].as_py()!r} has no member")
        parents = pc.list_parent_indices(members)
        lines, clusters, members = lines[parents.to_numpy()], clusters.take(parents), members.flatten()
    return Pairs(path, lines, clusters.cast(pa.string()), members.cast(pa.string()))


def _check_ids(pairs: Pairs) -> None:
    """Refuse a pair that lacks one of its ids."""
    for ids, fault in ((pairs.clusters, "the cluster has no id"), (pairs.members, "cluster {!r} has no member")):
        empty = pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)
        if empty.any():
            place = int(empty.argmax())
            raise InputError(f"{pairs.path}, line {pairs.lines[place]}: " + fault.format(pairs.clusters[place].as_py()))
