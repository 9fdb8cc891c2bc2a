"""Masked-language-model corruption, as ESM-2 was trained (Lin et al. 2023; Devlin et al. 2018).

15 % of the residues are targets. Of those 80 % become ``<mask>``, 10 % a random residue and 10 % stay, decided by *one*
draw per target: deciding mask first and random afterwards among the rest would leave 2 % random instead of 10 %.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from cistron.errors import ConfigError
from cistron.tokenizers import ProteinTokenizer

IGNORED: Final = -100
"""Target of a position that is not scored."""

Replacement = Literal["standard", "vocabulary"]
"""What random replacements are drawn from: the 20 standard residues, or all 33 tokens, special ones included."""

MASK_PROBABILITY: Final = 0.15
_MASK_SHARE: Final = 0.8
_RANDOM_SHARE: Final = 0.1


def mask_tokens(
    ids: NDArray[np.integer],
    *,
    rng: np.random.Generator,
    probability: float = MASK_PROBABILITY,
    replacement: Replacement = "standard",
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose targets among `ids` and corrupt them.

    Special tokens are never targets. A random token may be the old one. When no position of a short sequence is drawn,
    the one nearest to it is taken: every sequence with a residue has a target, so that none is read in vain and none
    has an undefined loss.

    Args:
        ids: [L] token ids of one sequence.
        rng: keyed by the sample, so that the outcome does not depend on who computes it.
        probability: share of the residues that become targets.
        replacement: what the tenth is drawn from. ``standard`` puts a residue in the place of a residue;
            ``vocabulary``, with which NVIDIA measured perplexities of ESM-2, may put even ``<pad>`` there.

    Returns:
        input_ids [L] and targets [L]; the target is -100 where nothing is asked.

    Raises:
        ConfigError: `probability` is not above 0 and at most 1.
    """
    if not 0 < probability <= 1:
        raise ConfigError(f"mask_probability must be above 0 and at most 1, got {probability}")
    tokens: NDArray[np.int64] = ids.astype(np.int64)
    chosen = _choose(tokens, rng=rng, probability=probability)
    fate = rng.random(len(tokens))
    drawn = ProteinTokenizer.standard_ids if replacement == "standard" else range(ProteinTokenizer.vocab_size)
    substitutes = rng.integers(drawn.start, drawn.stop, size=len(tokens))
    input_ids = np.where(chosen & (fate < _MASK_SHARE), ProteinTokenizer.mask_id, tokens)
    replaced = chosen & (fate >= _MASK_SHARE) & (fate < _MASK_SHARE + _RANDOM_SHARE)
    return np.where(replaced, substitutes, input_ids), np.where(chosen, tokens, IGNORED)


def _choose(ids: NDArray[np.int64], *, rng: np.random.Generator, probability: float) -> NDArray[np.bool_]:
    """Return [L] true at the targets."""
    draw = rng.random(len(ids))
    draw[np.isin(ids, ProteinTokenizer.special_ids)] = np.inf
    chosen: NDArray[np.bool_] = draw < probability
    if not chosen.any() and np.isfinite(draw).any():
        chosen[draw.argmin()] = True
    return chosen
