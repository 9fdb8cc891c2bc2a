"""What a model must beat: counts.

A Markov chain of order k predicts a base from the k bases before it, a unigram model predicts a residue from nothing.
Both are fitted on the training split with one added to every count, and scored on exactly the positions that the model
is scored on. The entropy of the scored letters themselves is the floor of anything that ignores context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cistron.alphabets import AMINO_ACIDS, NUCLEOTIDES
from cistron.data.mask import IGNORED
from cistron.data.samples import TrainingSample
from cistron.errors import InputError
from cistron.tokenizers import ESM2_TOKENS

_LETTERS: Final = len(NUCLEOTIDES)
_OTHER: Final = -1


class MarkovChain:
    """A Markov chain over A, C, G and T.

    Near the beginning of a document, or after a letter that is no base, the longest run of bases before the target
    takes the place of the k bases; chains of all lower orders are counted for that.

    Args:
        order: bases of context.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._counts = [np.ones((_LETTERS**k, _LETTERS)) for k in range(order + 1)]

    def fit(self, samples: Iterable[TrainingSample]) -> int:
        """Count the bases of next-token samples, whatever their weight; return how many there were."""
        fitted = 0
        for sample in samples:
            contexts, available, targets = self._positions(sample)
            for k, counts in enumerate(self._counts):
                usable = available >= k
                np.add.at(counts, (contexts[usable] % _LETTERS**k, targets[usable]), 1)
            fitted += len(targets)
        return fitted

    def losses(self, sample: TrainingSample) -> NDArray[np.float64]:
        """Return the negative log-likelihood of each scored position of a next-token sample, nats."""
        contexts, available, targets = self._positions(sample)
        order = np.minimum(available, self.order)
        losses = np.empty(len(targets))
        for k, counts in enumerate(self._counts):
            here = order == k
            rows = counts[contexts[here] % _LETTERS**k]
            losses[here] = np.log(rows.sum(axis=1)) - np.log(rows[np.arange(len(rows)), targets[here]])
        return losses

    def _positions(self, sample: TrainingSample) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return each scored position's context as a number in base 4, the bases it rests on, and its target."""
        bases = _base_codes(sample.input_ids)
        contexts = np.zeros(len(bases), dtype=np.int64)
        for back in range(min(self.order, len(bases))):
            contexts[back:] += np.maximum(bases[: len(bases) - back], 0) * _LETTERS**back
        places = np.arange(len(bases))
        last_other = np.maximum.accumulate(np.where(bases == _OTHER, places, -1))
        scored = sample.targets != IGNORED
        return contexts[scored], (places - last_other)[scored], _base_codes(sample.targets)[scored]


class UnigramModel:
    """Frequencies of the residues."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(ESM2_TOKENS))
        self._counts[[ESM2_TOKENS.index(letter) for letter in AMINO_ACIDS]] = 1

    def fit(self, samples: Iterable[TrainingSample]) -> int:
        """Count the residues of masked samples, the hidden ones included; return how many there were."""
        before = self._counts.sum()
        residues = self._counts > 0
        for sample in samples:
            original = np.where(sample.targets != IGNORED, sample.targets, sample.input_ids)
            self._counts += np.bincount(original, minlength=len(self._counts)) * residues
        return int(self._counts.sum() - before)

    def losses(self, sample: TrainingSample) -> NDArray[np.float64]:
        """Return the negative log-likelihood of each scored position of a masked sample, nats."""
        targets = sample.targets[sample.targets != IGNORED]
        return np.log(self._counts.sum()) - np.log(self._counts[targets])


def markov_entropy(train: Iterable[TrainingSample], valid: Iterable[TrainingSample], *, order: int) -> float:
    """Return the loss per scored base of an order-k chain fitted on `train`, nats.

    Raises:
        InputError: `valid` has no scored position.
    """
    chain = MarkovChain(order)
    chain.fit(train)
    return _mean(chain.losses(sample) for sample in valid)


def unigram_entropy(train: Iterable[TrainingSample], valid: Iterable[TrainingSample]) -> float:
    """Return the loss per masked residue of residue frequencies fitted on `train`, nats.

    Raises:
        InputError: `valid` has no scored position.
    """
    unigram = UnigramModel()
    unigram.fit(train)
    return _mean(unigram.losses(sample) for sample in valid)


def order_zero_entropy(valid: Iterable[TrainingSample]) -> float:
    """Return the entropy of the scored letters of `valid`, nats: the best that any fixed frequencies could do.

    Raises:
        InputError: `valid` has no scored position.
    """
    targets = [sample.targets[sample.targets != IGNORED] for sample in valid]
    counts = np.bincount(np.concatenate(targets)) if targets else np.zeros(0)
    total = counts.sum()
    if total == 0:
        raise InputError("no position is scored: the held-out samples hold no target")
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def _base_codes(ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return 0 to 3 for the ids of A, C, G and T, and -1 for all others."""
    table = np.full(256, _OTHER, dtype=np.int64)
    table[list(NUCLEOTIDES.encode("ascii"))] = range(_LETTERS)
    return np.where(ids >= 0, table[np.clip(ids, 0, 255)], _OTHER)


def _mean(losses: Iterable[NDArray[np.float64]]) -> float:
    sums = [(float(part.sum()), len(part)) for part in losses]
    count = sum(number for _, number in sums)
    if count == 0:
        raise InputError("no position is scored: the held-out samples hold no target")
    return math.fsum(total for total, _ in sums) / count
