"""Which letters are sample number n: a pure function of the seed and n.

The whole order of training is arithmetic. Nothing is shuffled in memory and nothing depends on the number of workers,
so the position of a run is one integer, any sample can be found in constant time, and two runs can be compared sample
by sample. Each epoch visits every document once, in an order given by a keyed permutation; where the corpus has
clusters, a document is one member of a cluster, drawn anew at every visit (UniRef50 and UniRef90; Lin et al. 2023).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from cistron.data.index import CorpusIndex
from cistron.data.mask import MASK_PROBABILITY, Replacement
from cistron.errors import ConfigError, InputError
from cistron.models.base import Objective

Crop = Literal["random", "start"]

LOWERCASE_WEIGHT: Final = 0.1
"""Loss weight of a soft-masked (lower-case, repetitive) base; what Evo 2 was trained with."""

_ROUNDS: Final = 6
_WORD: Final = (1 << 64) - 1
_CROP_STREAM: Final = 0
_MEMBER_STREAM: Final = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one training sample lies.

    Attributes:
        sample_index: its number in the run, from 0, never reset.
        epoch: how often the corpus was visited before.
        shard: number of the shard in the split.
        row: row in the shard.
        start: first letter in the row.
        length: letters (nt or residues).
    """

    sample_index: int
    epoch: int
    shard: int
    row: int
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """The order of training over one split.

    DNA rows are cut into windows of `max_length`, each a document of its own; a last window of one letter has nothing
    to predict and is left out. A protein is one document per epoch, cropped to `max_length` residues; of a corpus with
    clusters, each epoch has one document per cluster, drawn uniformly from its members.

    Attributes:
        index: the opened split.
        objective: ``next_token`` for DNA, ``masked`` for protein.
        max_length: letters of a sample at most.
        seed: of order, crops and masks.
        mask_probability: share of the residues that are targets (``masked`` only).
        lowercase_weight: loss weight of lower-case targets (``next_token`` only).
        crop: where a protein longer than `max_length` is cut: at a random place, new in each epoch, or after its start.
        keep_ends: whether a crop that lacks an end of its protein has ``<cls>`` and ``<eos>`` there all the same. Not
            so in the published training, as far as is known: the crop was of tokens, special ones included, so that
            the model can tell a true end from a cut.
        replacement: what a tenth of the targets is replaced by (``masked`` only).

    Raises:
        ConfigError: a setting is out of range or does not fit the corpus.
        InputError: the split holds no document.
    """

    index: CorpusIndex
    objective: Objective = field(kw_only=True)
    max_length: int = field(kw_only=True)
    seed: int = field(kw_only=True)
    mask_probability: float = field(kw_only=True, default=MASK_PROBABILITY)
    lowercase_weight: float = field(kw_only=True, default=LOWERCASE_WEIGHT)
    crop: Crop = field(kw_only=True, default="random")
    keep_ends: bool = field(kw_only=True, default=False)
    replacement: Replacement = field(kw_only=True, default="standard")
    _offsets: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "_offsets", self._document_offsets())
        if self.samples_per_epoch == 0:
            raise InputError(f"{self.index.path}: split {self.index.split!r} holds no document to train on")

    @property
    def samples_per_epoch(self) -> int:
        """Number of documents in the split."""
        return int(self._offsets[-1])

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sample, special tokens included; a token budget must hold it."""
        return self.max_length + (2 if self.objective == "masked" else 0)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the samples; two plans with one fingerprint are the same plan."""
        settings = [getattr(self, item.name) for item in fields(self) if item.init and item.name != "index"]
        return hashlib.sha256(repr((self.index.fingerprint, self.index.split, *settings)).encode()).hexdigest()

    def locate(self, sample_index: int) -> Sample:
        """Return where sample number `sample_index` lies; constant time, no state.

        Raises:
            InputError: `sample_index` is negative.
        """
        if sample_index < 0:
            raise InputError(f"sample_index must not be negative, got {sample_index}")
        epoch, position = divmod(sample_index, self.samples_per_epoch)
        document = permute(position, size=self.samples_per_epoch, seed=self.seed, epoch=epoch)
        row = self._row_of(sample_index, document)
        start, length = self._extent(sample_index, document, row)
        shard, row_in_shard = self.index.shard_of(row)
        return Sample(sample_index, epoch, shard, row_in_shard, start, length)

    def _row_of(self, sample_index: int, document: int) -> int:
        """Return the row that `document` is, or is part of; of a cluster, the member drawn for this visit."""
        if self.index.clusters is None:
            return int(np.searchsorted(self._offsets, document, side="right")) - 1
        members = self.index.clusters.members(document)
        rng = sample_rng(self.seed, sample_index, stream=_MEMBER_STREAM)
        return int(members[rng.integers(len(members))])

    def _extent(self, sample_index: int, document: int, row: int) -> tuple[int, int]:
        """Return the first letter and the length of `document` in its row."""
        available = int(self.index.lengths[row])
        if self.objective == "next_token":
            start = (document - int(self._offsets[row])) * self.max_length
        elif self.crop == "start" or available <= self.max_length:
            start = 0
        else:
            rng = sample_rng(self.seed, sample_index, stream=_CROP_STREAM)
            start = int(rng.integers(available - self.max_length + 1))
        return start, min(self.max_length, available - start)

    def _document_offsets(self) -> NDArray[np.int64]:
        """Return [rows + 1] (of clusters: [clusters + 1]), number of the first document of each row or cluster."""
        if self.objective == "masked":
            clusters = self.index.clusters
            return np.arange((self.index.num_rows if clusters is None else len(clusters)) + 1, dtype=np.int64)
        # A last window of one letter does not count.
        windows = (self.index.lengths + self.max_length - 2) // self.max_length
        return np.concatenate([[0], np.cumsum(windows)]).astype(np.int64)

    def _check(self) -> None:
        """Refuse settings that contradict the corpus."""
        wanted = "next_token" if self.index.alphabet == "dna" else "masked"
        if self.objective != wanted:
            raise ConfigError(
                f"{self.index.path} holds {self.index.alphabet}: its objective is {wanted!r}, "
                f"not {self.objective!r}; is this the right model for these data?"
            )
        if self.max_length < 2 or self.seed < 0:
            raise ConfigError(f"max_length must be at least 2 and seed at least 0, got {self.max_length}, {self.seed}")
        row_length = self.index.manifest.row_length
        if row_length is not None and self.max_length > row_length:
            raise ConfigError(
                f"max_length={self.max_length} is longer than the rows of {self.index.path}, which hold "
                f"{row_length} nt at most: prepare the data with row_length={self.max_length} or more"
            )


def permute(position: int, *, size: int, seed: int, epoch: int) -> int:
    """Return the image of `position` under a permutation of ``range(size)``, another one for each seed and epoch.

    A Feistel network permutes the next even power of two, and a result outside the range is sent through again until it
    falls inside (cycle walking): at most four times on average, in constant memory.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = position >> half_bits, position & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        position = left << half_bits | right
        if position < size:
            return position


def sample_rng(seed: int, sample_index: int, *, stream: int) -> np.random.Generator:
    """Return the random numbers of one sample; each use has its own stream, so that none shifts another."""
    return np.random.default_rng((seed, sample_index, stream))


def worker_block(block: int, *, start: int, rank: int, num_workers: int, samples_per_block: int) -> range:
    """Return the sample indices of block number `block` of one data-parallel worker.

    Blocks are dealt in turn: after the cursor `start`, worker 0 gets the first block, worker 1 the second, and so on.
    """
    first = start + (block * num_workers + rank) * samples_per_block
    return range(first, first + samples_per_block)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64).tolist())


def _mix(word: int) -> int:
    """Mix 64 bits (the finaliser of SplitMix64; Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
