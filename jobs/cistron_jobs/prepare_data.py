"""``cistron prepare_data input=genomes/ output=corpus alphabet=dna``: sequence files to a training corpus.

For ESM-2, give the members of clusters and which cluster each belongs to: ``input=uniref90.fasta.gz
clusters=uniref50_90.tsv``, or Parquet files that say it themselves, ``input=parquet/ name_column=ur90_id
cluster_column=ur50_id``.
"""

from __future__ import annotations

from dataclasses import fields

from pydantic import Field

from cistron.config import Config
from cistron.data.holdout import ClusterSettings, Unmapped
from cistron.data.index import Alphabet
from cistron.data.prepare import ROW_LENGTH, VALIDATION_FRACTION, prepare_corpus
from cistron_jobs.ray_session import ray_session


class PrepareDataConfig(Config):
    """Which files become which corpus."""

    input: str | tuple[str, ...]
    """FASTA (plain or gzip) or Parquet files, or folders of them; one or a list, local or s3://."""
    output: str
    """Folder to make; it must not exist."""
    alphabet: Alphabet
    """What the letters are."""
    row_length: int = Field(default=ROW_LENGTH, ge=2)
    """Longest DNA row in nt; a training window cannot be longer. Proteins are not cut."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Rows in each shard; null chooses about 64 Mi letters of DNA, or 131,072 proteins."""
    validation_fraction: float = Field(default=VALIDATION_FRACTION, ge=0, lt=1)
    """Share of the rows, or of the clusters, held out as the split `valid`; 0 makes none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split."""
    sequence_column: str = "sequence"
    """Parquet column that holds the letters."""
    name_column: str | None = None
    """Parquet column that holds the names; null names a record by its file and row."""
    clusters: str | None = None
    """File that maps proteins to clusters: text (cluster id, tab, member id, as MMseqs2 writes; plain or gzip) or
    Parquet. Each cluster is then one sample of an epoch, a member drawn at every visit."""
    cluster_column: str | None = None
    """Parquet column of the clusters' ids: of the mapping (null: ur50_id), or without a mapping of the input itself,
    whose name_column then holds the members' ids."""
    member_column: str | None = None
    """Parquet column of the members' ids in the mapping, text or lists of text (null: ur90_id)."""
    unmapped: Unmapped = "error"
    """What to do with a sequence that the mapping does not name: refuse the input, or leave the sequence out."""


def run(config: PrepareDataConfig) -> str:
    """Write the corpus and return its path."""
    clustering = {item.name for item in fields(ClusterSettings)}
    settings = config.model_dump(exclude={"input", "output", *clustering})
    clusters = ClusterSettings(**config.model_dump(include=clustering))
    inputs = [config.input] if isinstance(config.input, str) else list(config.input)
    with ray_session():
        prepare_corpus(inputs, config.output, **settings, clusters=clusters)
    return config.output
