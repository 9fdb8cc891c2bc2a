"""Sequence files to a corpus, as a Ray Data pipeline.

One task reads one file (or one row group of Parquet) in bounded memory; rows are validated, tokenised and cut where
they are read. Each split is then gathered into shards of equal row counts, in the order of the input, and each shard is
written by the task that holds it. The driver sees only lengths and hashes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from cistron.data.clusters import ClusterMap
from cistron.data.commit import commit
from cistron.data.holdout import TRAIN, VALID, ClusterSettings, Holdout, choose_holdout
from cistron.data.index import Alphabet, CorpusManifest, read_manifest
from cistron.data.rows import RowFormat, SourceFile, find_sources, read_rows
from cistron.data.shards import WrittenShard, rows_to_tables, write_shard
from cistron.errors import ConfigError, own_error
from cistron.io import storage
from cistron.io.storage import PathLike

_LOG = logging.getLogger(__name__)

ROW_LENGTH: Final = 131_072
"""Default DNA row in nt: also the distance between phylogenetic tags in Evo 2's corpus."""

VALIDATION_FRACTION: Final = 0.01
"""Default share of the rows that is held out."""

_GROUP_LETTERS: Final = 1 << 20
_PROTEINS_PER_GROUP: Final = 256
_PROTEINS_PER_SHARD: Final = 131_072
_SHARD_LETTERS: Final = 64 << 20


class SequenceSource(Datasource):
    """Rows of one split of sequence files, validated and tokenised, in the order of the files."""

    def __init__(
        self, sources: Sequence[SourceFile], form: RowFormat, split: str, holdout: ray.ObjectRef[Holdout]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = sources
        self._read = partial(_read, form=form, split=split, holdout=holdout)

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: how far a compressed file unpacks is not known before it is read."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Return one task per file or row group, whatever parallelism Ray would like."""
        unknown = BlockMetadata(None, None, None, None)
        return [ReadTask(partial(self._read, source), unknown) for source in self._sources]


def prepare_corpus(
    inputs: Sequence[PathLike],
    output: PathLike,
    *,
    alphabet: Alphabet,
    row_length: int = ROW_LENGTH,
    rows_per_shard: int | None = None,
    validation_fraction: float = VALIDATION_FRACTION,
    seed: int = 0,
    sequence_column: str = "sequence",
    name_column: str | None = None,
    clusters: ClusterSettings | None = None,
) -> CorpusManifest:
    """Write the corpus `output` from `inputs`: all of it, or nothing.

    The same input and settings give the same bytes, on any number of machines. Whether a row is for validation is
    decided by a hash of the seed, its record's name and its start. Clusters are held out whole, by a hash of the seed
    and the cluster's id; training on such a corpus visits each cluster once in an epoch, a member drawn every time.

    Args:
        inputs: FASTA (plain or gzip) or Parquet files, or folders of them; local or URLs.
        output: folder to make.
        alphabet: what the letters are.
        row_length: longest DNA row in nt; proteins are never cut here.
        rows_per_shard: ``None`` chooses about 64 Mi letters of DNA, or 131,072 proteins.
        validation_fraction: share of the rows in the split ``valid``; 0 makes none, and so, with a warning, does a
            share of so few rows that none is drawn.
        seed: of the split.
        sequence_column: Parquet column of the letters.
        name_column: Parquet column of the names; ``None`` names a record by its file and row.
        clusters: where it is written which protein belongs to which cluster; nowhere if not given.

    Raises:
        InputError: a missing, empty, malformed or damaged file; a name twice in one file; a mapping that names a
            sequence that is not there, or one sequence twice; `output` exists.
        SequenceError: a letter outside the alphabet; names file, record and position.
        ConfigError: a setting is out of range.
    """
    if not inputs or row_length < 2 or not 0 <= validation_fraction < 1:
        raise ConfigError(
            "prepare_data needs at least one input, row_length of 2 or more and validation_fraction in [0, 1), got "
            f"{list(inputs)}, {row_length}, {validation_fraction}"
        )
    form = RowFormat(alphabet, row_length, sequence_column, name_column)
    sources = find_sources([str(path) for path in inputs], form)
    paths = _paths(sources)
    clusters = clusters or ClusterSettings()
    mapping = clusters.mapping(form, paths)
    cluster_map = None if mapping is None else ClusterMap.load(mapping)
    holdout = choose_holdout(
        cluster_map, seed=seed, fraction=validation_fraction, paths=paths, unmapped=clusters.unmapped
    )
    rows_per_shard = rows_per_shard or _rows_per_shard(form)
    with storage.new_folder(output) as folder:
        pipeline = _Pipeline(
            sources=sources,
            form=form,
            folder=storage.absolute(folder),
            rows_per_shard=rows_per_shard,
            rows_per_group=min(rows_per_shard, _rows_per_group(form)),
            validation_fraction=validation_fraction,
            seed=seed,
        )
        written = pipeline.run_all(holdout)
        names = tuple(storage.name_of(path) for path in inputs)
        commit(folder, written, paths=paths, manifest=pipeline.manifest(names), clusters=cluster_map)
    return _summarise(output)


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """What every split is written with."""

    sources: Sequence[SourceFile]
    form: RowFormat
    folder: str
    rows_per_shard: int
    rows_per_group: int
    validation_fraction: float
    seed: int

    def run_all(self, holdout: Holdout) -> dict[str, list[WrittenShard]]:
        """Write every split; one that got no row is left out, with a warning, unless it is the one to train on."""
        held = ray.put(holdout)  # A mapping may be gigabytes: one copy per node.
        written = {
            split: self._run(split, held) for split in ((TRAIN, VALID) if self.validation_fraction else (TRAIN,))
        }
        if written.get(VALID) == []:
            _LOG.warning("no row fell into the split %r, so there is none: raise validation_fraction", VALID)
            del written[VALID]
            storage.remove_tree(storage.join(self.folder, VALID))
        return written

    def _run(self, split: str, holdout: ray.ObjectRef[Holdout]) -> list[WrittenShard]:
        """Write the shards of one split."""
        storage.make_dirs(storage.join(self.folder, split))
        dataset = ray.data.read_datasource(
            SequenceSource(self.sources, self.form, split, holdout), override_num_blocks=len(self.sources)
        )
        dataset.context.execution_options.preserve_order = True
        write = partial(_write, folder=self.folder, split=split, rows_per_group=self.rows_per_group)
        options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
        dataset = dataset.repartition(target_num_rows_per_block=self.rows_per_shard, strict=True)
        dataset = dataset.map_batches(write, **options)
        try:
            with without_ray_log():
                reports = list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        except Exception as error:
            raise own_error(error) from error
        return [shard for report in reports for shard in WrittenShard.from_table(report)]

    def manifest(self, sources: tuple[str, ...]) -> dict[str, Any]:
        """Return the fields of the manifest other than the splits."""
        return {
            "alphabet": self.form.alphabet,
            "row_length": self.form.row_length if self.form.alphabet == "dna" else None,
            "rows_per_group": self.rows_per_group,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "sources": sources,
        }


def _read(source: SourceFile, *, form: RowFormat, split: str, holdout: ray.ObjectRef[Holdout]) -> Iterator[pa.Table]:
    """Read the rows of one source that belong to `split`, on a worker."""
    held = ray.get(holdout)
    for table in rows_to_tables(read_rows(source, form), file_number=source.number):
        yield held.select(table, split)


def _write(table: pa.Table, *, folder: str, split: str, rows_per_group: int) -> pa.Table:
    """Write one shard, on a worker."""
    if not table.num_rows:
        return pa.table({})
    return write_shard(table, folder=folder, split=split, rows_per_group=rows_per_group).to_table()


@contextmanager
def without_ray_log() -> Iterator[None]:
    """Keep Ray Data from logging a refused file as its own fault, twice and with a trace; it raises the error, too."""
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _rows_per_shard(form: RowFormat) -> int:
    return max(1, _SHARD_LETTERS // form.row_length) if form.alphabet == "dna" else _PROTEINS_PER_SHARD


def _rows_per_group(form: RowFormat) -> int:
    return max(1, _GROUP_LETTERS // form.row_length) if form.alphabet == "dna" else _PROTEINS_PER_GROUP


def _paths(sources: Sequence[SourceFile]) -> list[str]:
    """Return the path of each file, by its number."""
    return list({source.number: source.path for source in sources}.values())


def _summarise(output: PathLike) -> CorpusManifest:
    """Log what was written and return it."""
    manifest, _ = read_manifest(output)
    for name, split in manifest.splits.items():
        _LOG.info(
            "%s: %d records, %s%d rows, %d letters, %d shards",
            name,
            split.records,
            f"{split.clusters.clusters} clusters, " if split.clusters else "",
            split.rows,
            split.letters,
            len(split.shards),
        )
    return manifest
