"""How well a score tells damaging variants from others: AUROC and AUPRC with bootstrap intervals, and a baseline.

All metrics are computed from histograms over the distinct scores, so ties are treated exactly and a thousand bootstrap
resamples take a second. A resample draws as many variants of each class as there are (stratified), which over the
histogram is one multinomial draw per class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cistron.errors import InputError

Array: TypeAlias = NDArray[np.float64]

RESAMPLES: Final = 2000
_LEVEL: Final = 0.95
_RESAMPLES_AT_ONCE: Final = 100

CONSEQUENCES: Final = (
    "Intronic",
    "5' UTR",
    "Synonymous",
    "Splice region",
    "Missense",
    "Canonical splice",
    "Nonsense",
)
"""Classes of consequence from the mildest to the most severe, as general knowledge orders them: no label is used."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and the 95 % percentile interval of its bootstrap (Efron 1979, doi:10.1214/aos/1176344552)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a ROC or precision-recall curve, from the highest score down."""

    x: Array
    y: Array


@dataclass(frozen=True, slots=True)
class Discrimination:
    """How well a score finds the positives.

    Attributes:
        auroc: chance that a positive scores higher than a negative, ties counting half.
        auprc: average precision.
        roc: false-positive rate and true-positive rate.
        pr: recall and precision.
        num_positives: how many there are.
        num_negatives: how many others.
    """

    auroc: Estimate
    auprc: Estimate
    roc: Curve
    pr: Curve
    num_positives: int
    num_negatives: int


def discrimination(
    is_positive: Sequence[bool] | NDArray[np.bool_],
    scores: Sequence[float] | Array,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Discrimination:
    """Measure how well high scores mark the positives.

    Args:
        is_positive: [N], which ones are to be found.
        scores: [N], finite; higher means rather positive.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InputError: lengths that differ, a score that is not finite, or a class without members.
    """
    labels, values = np.asarray(is_positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    if labels.shape != values.shape or labels.ndim != 1:
        raise InputError(f"labels and scores must be lists of one length, got {labels.shape} and {values.shape}")
    if not np.isfinite(values).all():
        raise InputError(f"score {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    if not 0 < labels.sum() < len(labels):
        raise InputError(f"both classes are needed: {int(labels.sum())} of {len(labels)} are positive")
    positives, negatives = _histograms(labels, values)
    draws = _resampled(positives, negatives, resamples, seed)
    true_positives, false_positives = np.cumsum(positives), np.cumsum(negatives)
    recall = true_positives / true_positives[-1]
    return Discrimination(
        auroc=_estimate(_auroc, positives, negatives, draws),
        auprc=_estimate(_average_precision, positives, negatives, draws),
        roc=Curve(np.append(0.0, false_positives / false_positives[-1]), np.append(0.0, recall)),
        pr=Curve(recall, true_positives / (true_positives + false_positives)),
        num_positives=int(labels.sum()),
        num_negatives=int((~labels).sum()),
    )


def consequence_scores(consequences: Sequence[str]) -> Array:
    """Return the severity of each consequence, the score of a baseline that knows nothing else.

    Raises:
        InputError: a class that has no place in the order.
    """
    unknown = sorted(set(consequences) - set(CONSEQUENCES))
    if unknown:
        raise InputError(f"consequence {unknown[0]!r} has no place in the order {', '.join(CONSEQUENCES)}")
    return np.array([CONSEQUENCES.index(name) for name in consequences], dtype=np.float64)


def _histograms(labels: NDArray[np.bool_], values: Array) -> tuple[Array, Array]:
    """Return the positives and the negatives at each distinct score, the highest first."""
    distinct, places = np.unique(-values, return_inverse=True)
    count = [np.bincount(places[chosen], minlength=len(distinct)).astype(np.float64) for chosen in (labels, ~labels)]
    return count[0], count[1]


def _resampled(positives: Array, negatives: Array, resamples: int, seed: int) -> list[tuple[Array, Array]]:
    """Return histograms [R, G] of stratified resamples, in pieces."""
    generator = np.random.default_rng(seed)
    sizes = [min(_RESAMPLES_AT_ONCE, resamples - done) for done in range(0, resamples, _RESAMPLES_AT_ONCE)]

    def drawn(histogram: Array, size: int) -> Array:
        total = histogram.sum()
        return generator.multinomial(int(total), histogram / total, size=size).astype(np.float64)

    return [(drawn(positives, size), drawn(negatives, size)) for size in sizes]


def _estimate(
    metric: Callable[[Array, Array], Array], positives: Array, negatives: Array, draws: Sequence[tuple[Array, Array]]
) -> Estimate:
    values = np.concatenate([metric(*draw) for draw in draws])
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(metric(positives, negatives)), float(low), float(high))


def _auroc(positives: Array, negatives: Array) -> Array:
    """Return the area under the ROC curve of histograms [..., G]: the Mann-Whitney statistic."""
    above = np.cumsum(positives, axis=-1) - positives / 2
    pairs = positives.sum(axis=-1) * negatives.sum(axis=-1)
    return np.asarray((above * negatives).sum(axis=-1) / pairs)


def _average_precision(positives: Array, negatives: Array) -> Array:
    """Return the mean precision at the positives of histograms [..., G]."""
    found = np.cumsum(positives, axis=-1)
    selected = found + np.cumsum(negatives, axis=-1)
    precision = found / np.maximum(selected, 1)
    return np.asarray((positives * precision).sum(axis=-1) / positives.sum(axis=-1))
