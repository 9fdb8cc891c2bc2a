"""The last step of ``prepare_data``: shards get their numbers, and tables and ``index.json`` are written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cistron.data.clusters import ClusterMap
from cistron.data.index import INDEX_FILE, ClusterTable, CorpusManifest, Shard, Split
from cistron.data.shards import WrittenShard
from cistron.errors import InputError
from cistron.io import storage


def commit(
    folder: str,
    splits: dict[str, list[WrittenShard]],
    *,
    paths: Sequence[str],
    manifest: dict[str, Any],
    clusters: ClusterMap | None = None,
) -> None:
    """Number the shards, write the tables, and last ``index.json``, which makes `folder` a corpus.

    Args:
        folder: where the shards were written.
        splits: the report of every shard.
        paths: path of each input file, by its number.
        manifest: the fields of ``CorpusManifest`` other than `splits`.
        clusters: which rows are one cluster; ``None`` makes every row a sample of its own.

    Raises:
        InputError: a split is empty, a name occurs twice in one file (or, of a member of a cluster, in all files), or
            a member of a cluster is missing.
    """
    ordered = {name: sorted(shards, key=lambda shard: shard.file) for name, shards in splits.items()}
    for name, shards in ordered.items():
        if not shards:
            raise InputError(f"no row fell into the split {name!r}: change validation_fraction, seed or row_length")
    every = [shard for shards in ordered.values() for shard in shards]
    _check_duplicates(every, folder, paths, across_files=clusters is not None)
    if clusters is not None:
        clusters.check_complete(np.concatenate([shard.name_keys for shard in every]))
    written = {name: _commit_split(folder, name, shards, clusters) for name, shards in ordered.items()}
    index = CorpusManifest(splits=written, **manifest)
    storage.write_text(storage.join(folder, INDEX_FILE), index.model_dump_json(indent=2) + "\n")


def _commit_split(folder: str, name: str, shards: list[WrittenShard], clusters: ClusterMap | None) -> Split:
    """Give the shards of one split their final names and write its tables."""
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
        clusters=None if clusters is None else _write_clusters(folder, name, shards, clusters),
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
    return _write_table(path, table)


def _write_clusters(folder: str, name: str, shards: list[WrittenShard], clusters: ClusterMap) -> ClusterTable:
    """Write the table of the clusters of one split; a protein is one row, so its records are its rows."""
    table = clusters.table(np.concatenate([shard.name_keys for shard in shards]))
    file = f"{name}/clusters.parquet"
    return ClusterTable(file=file, sha256=_write_table(storage.join(folder, file), table), clusters=table.num_rows)


def _write_table(path: str, table: pa.Table) -> str:
    """Write a table and return the file's SHA-256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _check_duplicates(shards: list[WrittenShard], folder: str, paths: Sequence[str], *, across_files: bool) -> None:
    """Refuse a name that stands twice in one file; other files may use it too, as genomes share `chr1`.

    With `across_files` they may not: a cluster's member is one sequence.
    """
    files = np.concatenate([shard.file_numbers for shard in shards])
    lines = np.concatenate([shard.lines for shard in shards])
    keys = np.concatenate([shard.name_keys for shard in shards])
    order = np.lexsort((lines, files, keys))
    same = (np.diff(keys[order]) == 0) & ((np.diff(files[order]) == 0) | across_files)
    if not same.any():
        return
    first, second = order[same.argmax()], order[same.argmax() + 1]
    name = _find_name(shards, folder, int(second))
    if files[first] == files[second]:
        places, scope = f"{paths[files[first]]}: lines {lines[first]} and {lines[second]}", "in a file"
    else:
        places = f"{paths[files[first]]}, line {lines[first]}, and {paths[files[second]]}, line {lines[second]},"
        scope = "where clusters refer to them"
    raise InputError(f"{places} hold records of one name ({name!r}); names must be unique {scope}")


def _find_name(shards: list[WrittenShard], folder: str, record: int) -> str:
    """Return the name of record number `record` among those that begin in `shards`."""
    for shard in shards:
        if record < len(shard.lines):
            with storage.open_input(storage.join(folder, shard.file)) as stream:
                table = pq.read_table(stream, columns=["name", "start"])
            return str(table.filter(pc.equal(table.column("start"), 0)).column("name")[record].as_py())
        record -= len(shard.lines)
    raise AssertionError("the record was counted, so it is in a shard")
