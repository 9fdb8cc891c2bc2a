"""Settings that every job which runs a model over many records shares."""

from __future__ import annotations

from typing import Final, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from cistron_jobs.model_config import ModelJobConfig

RECORDS_PER_PART: Final = 1024
LETTERS_PER_PART: Final = 1 << 19
"""Minutes of a small model on a CPU, seconds on a GPU: what a kill can cost. Records of DNA are padded to the
longest of their batch, and those of a smaller part differ more in length; proteins are packed."""


class BulkConfig(ModelJobConfig):
    """How many actors run a model, and in which pieces."""

    actors: NonNegativeInt | None = None
    """Ray actors, each with its own copy of the model, on a GPU of its own when there are GPUs; 0 runs in this process,
    without Ray. null: on a cluster (RAY_ADDRESS), or where several GPUs are, one per GPU; else 0."""
    cpus_per_actor: PositiveInt | None = None
    """Cores that an actor computes with and reserves; null shares this machine's among the actors. With another
    number a CPU may round otherwise: name one where the outputs of 1 and of 4 actors must be the same bytes."""
    records_per_part: PositiveInt = RECORDS_PER_PART
    """Most records of a part: what is in memory at once, a row group of the output, and what a kill can cost."""
    letters_per_part: PositiveInt = LETTERS_PER_PART
    """Most nucleotides or residues of a part; a longer record is a part of its own."""
    restart: bool = False
    """Compute everything anew: forget the finished parts of an interrupted run, and a finished output."""

    @model_validator(mode="after")
    def _let_ray_choose_the_gpu(self) -> Self:
        if self.actors and ":" in self.device:
            raise ValueError(f"device={self.device} and actors={self.actors}: Ray gives each actor a GPU; say cuda")
        return self
