"""Small corpora for tests, written without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cistron.data.clusters import ClusterMap
from cistron.data.commit import commit
from cistron.data.index import CorpusIndex
from cistron.data.rows import RowFormat, SourceFile, read_rows
from cistron.data.shards import rows_to_tables, write_shard
from cistron.io.fasta import FastaRecord, write_fasta


def make_corpus(
    folder: Path,
    sequences: Sequence[str],
    *,
    alphabet: str = "dna",
    row_length: int = 100,
    rows_per_shard: int = 4,
    rows_per_group: int = 2,
    clusters: ClusterMap | None = None,
) -> CorpusIndex:
    """Write `sequences`, named record0, record1, .., as the split ``train`` of a corpus in `folder` and open it."""
    fasta = folder.parent / f"{folder.name}.fasta"
    write_fasta(fasta, [FastaRecord(f"record{i}", "", sequence) for i, sequence in enumerate(sequences)])
    form = RowFormat(alphabet=alphabet, row_length=row_length, sequence_column="sequence")
    rows = list(read_rows(SourceFile(str(fasta), 0), form))
    (folder / "train").mkdir(parents=True)
    shards = []
    for first in range(0, len(rows), rows_per_shard):
        (table,) = rows_to_tables(rows[first : first + rows_per_shard], file_number=0)
        shards.append(write_shard(table, folder=str(folder), split="train", rows_per_group=rows_per_group))
    fields = {
        "alphabet": alphabet,
        "row_length": row_length if alphabet == "dna" else None,
        "rows_per_group": rows_per_group,
        "validation_fraction": 0.0,
        "seed": 0,
        "sources": (fasta.name,),
    }
    commit(str(folder), {"train": shards}, paths=[str(fasta)], manifest=fields, clusters=clusters)
    return CorpusIndex.open(folder, "train")
