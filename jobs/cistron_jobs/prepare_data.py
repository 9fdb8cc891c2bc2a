"""``cistron prepare_data input=genomes/ output=corpus alphabet=dna``: sequence files to a training corpus."""

from __future__ import annotations

from pydantic import Field

from cistron.config import Config
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
    """Share of the rows held out as the split `valid`; 0 makes none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split."""
    sequence_column: str = "sequence"
    """Parquet column that holds the letters."""
    name_column: str | None = None
    """Parquet column that holds the names; null names a record by its file and row."""


def run(config: PrepareDataConfig) -> str:
    """Write the corpus and return its path."""
    settings = config.model_dump(exclude={"input", "output"})
    inputs = [config.input] if isinstance(config.input, str) else list(config.input)
    with ray_session():
        prepare_corpus(inputs, config.output, **settings)
    return config.output
