"""What a prepared corpus holds: shards, rows per shard, letters per row, and the hashes that pin them.

``index.json`` is written last by ``prepare_data``, so a folder without it is not a corpus, and its own hash names the
corpus: a run that resumes on other data can tell.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from cistron.config import Config
from cistron.errors import InputError, nearest
from cistron.io import storage
from cistron.io.storage import PathLike

Alphabet = Literal["dna", "protein"]

INDEX_FILE: Final = "index.json"
INDEX_VERSION: Final = 1


class Shard(Config):
    """One Parquet file of rows."""

    file: str
    """Path below the corpus folder."""
    rows: int
    letters: int
    bytes: int
    sha256: str


class ClusterTable(Config):
    """Which rows of a split are one cluster."""

    file: str
    """Path below the corpus folder: one row per cluster, its id and the numbers of its rows in the split."""
    sha256: str
    clusters: int


class Split(Config):
    """One part of the corpus."""

    rows: int
    letters: int
    records: int
    """Number of records (FASTA entries) with their first row here."""
    index: str
    """Path of the per-row table below the corpus folder."""
    index_sha256: str
    shards: tuple[Shard, ...]
    clusters: ClusterTable | None = None
    """Absent where every row is a sample of its own."""


class CorpusManifest(Config):
    """Content of ``index.json``."""

    version: Literal[1] = INDEX_VERSION
    alphabet: Alphabet
    row_length: int | None
    """Longest row in nt; ``None`` where rows are whole proteins."""
    rows_per_group: int
    """Rows in each Parquet row group: what one read of one row decodes."""
    validation_fraction: float
    seed: int
    sources: tuple[str, ...]
    splits: dict[str, Split]


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of one split.

    Attributes:
        rows: [rows] int64, numbers of the rows, cluster after cluster.
        offsets: [clusters + 1] int64, place in `rows` of the first row of each cluster.
    """

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def members(self, cluster: int) -> NDArray[np.int64]:
        """Return the numbers of the rows of cluster number `cluster`; constant time."""
        return self.rows[self.offsets[cluster] : self.offsets[cluster + 1]]


@dataclass(frozen=True, eq=False)
class CorpusIndex:
    """One split of a prepared corpus, opened.

    Attributes:
        path: the corpus folder, local or a URL.
        split: name of the split.
        manifest: the whole ``index.json``.
        lengths: [rows] int64, letters (nt or residues) of each row, shard after shard.
        row_offsets: [shards + 1] int64, number of the first row of each shard.
        fingerprint: SHA-256 of ``index.json``.
        clusters: which rows are one cluster, or None where every row is a sample of its own.
    """

    path: str
    split: str
    manifest: CorpusManifest
    lengths: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    fingerprint: str
    clusters: Clusters | None = None

    @classmethod
    def open(cls, path: PathLike, split: str) -> CorpusIndex:
        """Open one split of the corpus at `path`.

        Raises:
            InputError: no corpus there, no such split, or an index that is damaged.
        """
        manifest, fingerprint = read_manifest(path)
        if split not in manifest.splits:
            known = ", ".join(manifest.splits)
            raise InputError(f"{path}: no split {split!r}{nearest(split, manifest.splits)} (has: {known})")
        rows = [shard.rows for shard in manifest.splits[split].shards]
        offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        lengths = _read_lengths(path, manifest.splits[split])
        clusters = _read_clusters(path, manifest.splits[split])
        return cls(str(path), split, manifest, lengths, offsets, fingerprint, clusters)

    @property
    def alphabet(self) -> Alphabet:
        """Kind of letters in the rows."""
        return self.manifest.alphabet

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Shards of this split, in order."""
        return self.manifest.splits[self.split].shards

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def num_letters(self) -> int:
        """Number of letters."""
        return int(self.lengths.sum())

    def shard_of(self, row: int) -> tuple[int, int]:
        """Return the shard of row number `row`, and the row's place in it."""
        shard = int(np.searchsorted(self.row_offsets, row, side="right")) - 1
        return shard, row - int(self.row_offsets[shard])

    def verify(self, *, hashes: bool = False) -> None:
        """Check that every shard exists with its size, and with `hashes` that its content is the recorded one.

        Raises:
            InputError: a shard is missing, cut short or changed; names it.
        """
        for shard in self.shards:
            file = storage.join(self.path, shard.file)
            size = storage.file_size(file)
            if size != shard.bytes:
                raise InputError(f"{file}: {size:,} bytes, but the index says {shard.bytes:,}")
            if hashes and storage.sha256(file) != shard.sha256:
                raise InputError(f"{file}: the content is not what the index says (sha256 differs)")


def read_manifest(path: PathLike) -> tuple[CorpusManifest, str]:
    """Return ``index.json`` of the corpus at `path`, and its SHA-256.

    Raises:
        InputError: the folder is not a prepared corpus, or of an unknown version.
    """
    file = storage.join(path, INDEX_FILE)
    if not storage.exists(file):
        raise InputError(f"{path}: not a prepared corpus (no {INDEX_FILE}); make one with: cistron prepare_data")
    content = storage.read_bytes(file)
    try:
        data: dict[str, Any] = json.loads(content)
        if data.get("version") != INDEX_VERSION:
            raise InputError(f"{file}: version {data.get('version')!r}, and this Cistron reads version {INDEX_VERSION}")
        manifest = CorpusManifest.model_validate(data)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, ValidationError) as error:
        raise InputError(f"{file}: damaged ({error})") from error
    return manifest, hashlib.sha256(content).hexdigest()


def _read_lengths(path: PathLike, split: Split) -> NDArray[np.int64]:
    """Read the per-row table of `split`; only the column that sampling needs is kept."""
    file = storage.join(path, split.index)
    table = _read_table(file, split.index_sha256, column="length")
    lengths: NDArray[np.int64] = table.column("length").to_numpy()
    if len(lengths) != split.rows:
        raise InputError(f"{file}: {len(lengths):,} rows, but {INDEX_FILE} says {split.rows:,}")
    return lengths


def _read_clusters(path: PathLike, split: Split) -> Clusters | None:
    """Read the table of the clusters of `split`, if it has one."""
    if split.clusters is None:
        return None
    table = _read_table(storage.join(path, split.clusters.file), split.clusters.sha256, column="rows")
    lists = table.column("rows").combine_chunks()
    return Clusters(lists.flatten().to_numpy(), lists.offsets.to_numpy().astype(np.int64))


def _read_table(file: str, sha256: str, *, column: str) -> pa.Table:
    """Return one column of a Parquet file whose hash the manifest holds."""
    content = storage.read_bytes(file)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{file}: the content is not what {INDEX_FILE} says (sha256 differs)")
    return pq.read_table(pa.BufferReader(content), columns=[column])
