"""How a protein longer than any in training is read: in windows, each between ``<cls>`` and ``<eos>`` of its own.

ESM-2's positions are rotary, so it reads any length, but it was trained on 1,022 residues (1,024 tokens) at most and is
worse beyond them. Longer proteins are therefore read in windows of that size unless a larger one is asked for:

- A masked residue is seen in one window, centred on it as far as the protein's ends allow.
- Unmasked, windows begin half a window apart, the last one at the protein's end. What two windows say of a residue is
  averaged with weights that fall off towards a cut, 1 / (1 + exp((c - d) / t)) at the d-th residue from it, with
  c = 128 and t = 16 for 1,024 tokens and in proportion for others. The protein's own ends are no cuts.

Nothing is ever left out. Both rules are those of the published scoring of deep mutational scans (Notin et al. 2023,
ProteinGym; the overlap is that of Brandes et al. 2023, doi:10.1038/s41588-023-01465-0), but for the special tokens:
there a window in the middle has none.
"""

from __future__ import annotations

import logging
from numbers import Integral
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cistron.errors import InputError
from cistron.models.base import SequenceModel
from cistron.models.families import config_of

logger = logging.getLogger(__name__)

_CENTRE_SHARE: Final = 1 / 8
_SLOPE_SHARE: Final = 1 / 64
"""Where the weights of a window are one half, and how steep they are there, as shares of its tokens."""


class ProteinWindow(NamedTuple):
    """Residues `start` to `stop` of a protein, and each one's share in the stitched result; None means all of it."""

    start: int
    stop: int
    weights: NDArray[np.float64] | None

    @property
    def share(self) -> float:
        """Share of the protein's residues that this window stands for, times their number."""
        return float(self.stop - self.start if self.weights is None else self.weights.sum())


def check_window(model: SequenceModel, window: int | None) -> None:
    """Raise ``InputError`` for a window that is no number of residues, or any with a model that reads no proteins."""
    if window is None:
        return
    if model.family != "esm2":
        raise InputError(f"window applies to protein models, and this is {model.family}")
    if not isinstance(window, Integral):
        raise InputError(f"window must be a whole number of residues, got {window!r}")
    if window < 1:
        raise InputError(f"window must be at least 1 residue, got {window}")


def residues_per_window(model: SequenceModel, window: int | None, *, longest: int) -> int:
    """Return the residues that ESM-2 sees at once: `window`, or as many as it saw in training.

    Args:
        model: ESM-2.
        window: what was asked for, if anything.
        longest: residues of the longest protein; windows, and lengths that the model never saw, are logged.

    Raises:
        InputError: a window without a residue.
    """
    check_window(model, window)
    trained = config_of(model).max_length
    if window is None:
        window = trained
    if longest > window:
        logger.info("proteins of up to %d residues are read in windows of %d", longest, window)
    if min(longest, window) > trained:
        logger.warning(
            "%s reads %d residues at once, but was trained on %d", model.family, min(longest, window), trained
        )
    return window


def centred_start(position: int, *, length: int, window: int) -> int:
    """Return where a window begins that is centred on `position`, as far as the ends of the protein allow.

    >>> [centred_start(position, length=10, window=4) for position in (0, 2, 5, 9)]
    [0, 0, 3, 6]
    """
    return max(0, min(position - window // 2, length - window))


def overlapping_windows(length: int, *, window: int) -> list[ProteinWindow]:
    """Cut a protein of `length` residues; every residue's weights sum to one over the windows that hold it.

    >>> [(part.start, part.stop) for part in overlapping_windows(11, window=4)]
    [(0, 4), (2, 6), (4, 8), (6, 10), (7, 11)]
    """
    if length <= window:
        return [ProteinWindow(0, length, None)]
    starts = [*_starts_before_the_last(length, window), length - window]
    raw = [_edge_weights(window, cut_left=start > 0, cut_right=start + window < length) for start in starts]
    total = np.zeros(length)
    for start, weights in zip(starts, raw, strict=True):
        total[start : start + window] += weights
    return [
        ProteinWindow(start, start + window, weights / total[start : start + window])
        for start, weights in zip(starts, raw, strict=True)
    ]


def num_windows(length: int, *, window: int) -> int:
    """Return the number of :func:`overlapping_windows`."""
    return 1 + len(_starts_before_the_last(length, window))


def _starts_before_the_last(length: int, window: int) -> range:
    return range(0, length - window, max(1, window // 2))


def _edge_weights(window: int, *, cut_left: bool, cut_right: bool) -> NDArray[np.float64]:
    tokens = window + 2
    distance = np.arange(1, window + 1)
    rising = 1 / (1 + np.exp((_CENTRE_SHARE * tokens - distance) / (_SLOPE_SHARE * tokens)))
    weights = np.ones(window)
    if cut_left:
        weights *= rising
    if cut_right:
        weights *= rising[::-1]
    return weights
