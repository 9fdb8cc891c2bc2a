"""Settings of the data of a training run."""

from __future__ import annotations

from pydantic import Field

from cistron.config import Config
from cistron.data.index import CorpusIndex
from cistron.data.mask import MASK_PROBABILITY, Replacement
from cistron.data.plan import LOWERCASE_WEIGHT, Crop, SamplePlan
from cistron.models.base import Objective


class DataConfig(Config):
    """Which corpus, and how samples are cut from it."""

    path: str
    """Folder (or s3:// URL) that `cistron prepare_data` wrote."""
    max_length: int = Field(ge=2)
    """Longest sample: nt of a DNA window, or residues of a protein crop (special tokens not counted)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order, the members of clusters, the crops and the masks."""
    mask_probability: float = Field(default=MASK_PROBABILITY, gt=0, le=1)
    """Share of the residues that ESM-2 has to predict."""
    lowercase_weight: float = Field(default=LOWERCASE_WEIGHT, ge=0, le=1)
    """Loss weight of lower-case (repetitive) bases; 1 treats all bases alike."""
    crop: Crop = "random"
    """Where a protein longer than max_length is cut: at a random place, or after its start."""
    keep_ends: bool = False
    """Put <cls> and <eos> around every crop of a protein, also where it was cut; otherwise only at its true ends."""
    replacement: Replacement = "standard"
    """What a tenth of ESM-2's targets is replaced by: one of the 20 standard residues, or of the whole vocabulary."""


def build_plan(config: DataConfig, *, split: str, objective: Objective) -> SamplePlan:
    """Open one split of the corpus, check that its shards are there, and return its plan.

    Raises:
        ConfigError: the settings do not fit the corpus, or the corpus does not fit the objective.
        InputError: no corpus at the path, no such split, or a shard is missing or cut short.
    """
    index = CorpusIndex.open(config.path, split)
    index.verify()
    settings = config.model_dump(exclude={"path"})
    return SamplePlan(index, objective=objective, **settings)
