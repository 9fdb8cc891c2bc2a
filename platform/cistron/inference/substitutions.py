"""Effect of amino-acid substitutions under ESM-2, by the three published strategies.

``masked-marginal``: mask each mutated position alone and compare the two residues' log-probabilities there.
``wt-marginal``: the same from the unmasked wild type. ``pseudo-ppl``: the mutant's pseudo-log-likelihood minus the wild
type's. The first two add up over the substitutions of a multiple mutant. Log-probabilities are over all 33 tokens.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cistron.alphabets import AMINO_ACIDS
from cistron.errors import InputError
from cistron.inference.batching import length_sorted_batches, padded
from cistron.inference.score import masked_log_probs
from cistron.models.base import SequenceModel
from cistron.tokenizers import ProteinTokenizer

ProteinStrategy: TypeAlias = Literal["masked-marginal", "wt-marginal", "pseudo-ppl"]

_SUBSTITUTION: Final = re.compile(rf"([{AMINO_ACIDS}])([1-9]\d*)([{AMINO_ACIDS}])")


@dataclass(frozen=True, slots=True)
class Substitution:
    """One replaced residue; `position` is 0-based."""

    wild_type: str
    position: int
    mutant: str


def score_substitutions(
    model: SequenceModel,
    variants: Sequence[Any],
    reference: Any,
    *,
    window: int,
    strategy: str,
    token_budget: int,
) -> pa.Table:
    """Score ``A23T``-like variants of one protein; returns columns variant and score.

    Args:
        model: ESM-2.
        variants: substitutions, several joined by ``:``; positions are 1-based.
        reference: the wild-type sequence.
        window: residues around a position that the marginal strategies show to the model.
        strategy: one of :data:`ProteinStrategy`.
        token_budget: most tokens of one forward pass, padding included.

    Raises:
        InputError: an unknown strategy, or a variant that is malformed or contradicts the wild type.
        SequenceError: the wild type is not a protein.
    """
    if strategy not in get_args(ProteinStrategy):
        raise InputError(f"strategy must be one of {', '.join(get_args(ProteinStrategy))}, got {strategy!r}")
    if window < 1:
        raise InputError(f"window must be at least 1 residue, got {window}")
    if not isinstance(reference, str):
        raise InputError(f"reference must be the wild-type protein sequence, got a {type(reference).__name__}")
    wild_type = model.tokenizer.validate(reference, name="reference")
    parsed = [_parsed(index, variant, wild_type) for index, variant in enumerate(variants)]
    if strategy == "pseudo-ppl":
        scores = _pseudo_likelihood_changes(model, parsed, wild_type, token_budget)
    else:
        masked = strategy == "masked-marginal"
        scores = _marginals(model, parsed, wild_type, window=window, masked=masked, token_budget=token_budget)
    return pa.table({"variant": pa.array(list(variants), pa.string()), "score": pa.array(scores, pa.float64())})


def _parsed(index: int, variant: Any, wild_type: str) -> list[Substitution]:
    """Read one variant and compare it with the wild type."""
    if not isinstance(variant, str):
        raise InputError(f"variant {index}: must be a string such as 'A23T' or 'A23T:G45D', got {variant!r}")
    substitutions = []
    for word in variant.split(":"):
        match = _SUBSTITUTION.fullmatch(word)
        if match is None:
            raise InputError(f"variant {index} ({variant!r}): cannot read {word!r}; write it as 'A23T'")
        substitution = Substitution(match[1], int(match[2]) - 1, match[3])
        if substitution.position >= len(wild_type):
            raise InputError(f"variant {index} ({variant!r}): {word} is past the end, at {len(wild_type)} residues")
        found = wild_type[substitution.position]
        if found != substitution.wild_type:
            raise InputError(f"variant {index} ({variant!r}): the wild type has {found} at {match[2]}, not {match[1]}")
        substitutions.append(substitution)
    if len({substitution.position for substitution in substitutions}) < len(substitutions):
        raise InputError(f"variant {index} ({variant!r}): replaces one position twice")
    return substitutions


def _pseudo_likelihood_changes(
    model: SequenceModel, variants: Sequence[list[Substitution]], wild_type: str, token_budget: int
) -> list[float]:
    mutants = ["".join(_mutated(wild_type, substitutions)) for substitutions in variants]
    unique = list(dict.fromkeys([wild_type, *mutants]))
    values = masked_log_probs(model, unique, token_budget=token_budget)
    likelihood = {sequence: float(v.sum(dtype=np.float64)) for sequence, v in zip(unique, values, strict=True)}
    return [likelihood[mutant] - likelihood[wild_type] for mutant in mutants]


def _mutated(wild_type: str, substitutions: Sequence[Substitution]) -> list[str]:
    residues = list(wild_type)
    for substitution in substitutions:
        residues[substitution.position] = substitution.mutant
    return residues


def _marginals(
    model: SequenceModel,
    variants: Sequence[list[Substitution]],
    wild_type: str,
    *,
    window: int,
    masked: bool,
    token_budget: int,
) -> list[float]:
    positions = sorted({substitution.position for substitutions in variants for substitution in substitutions})
    table = _letter_log_probs(model, wild_type, positions, window=window, masked=masked, token_budget=token_budget)
    ids = {letter: int(model.tokenizer.encode(letter)[1]) for letter in AMINO_ACIDS}
    return [
        float(sum(table[s.position][ids[s.mutant]] - table[s.position][ids[s.wild_type]] for s in substitutions))
        for substitutions in variants
    ]


def _letter_log_probs(
    model: SequenceModel, wild_type: str, positions: Sequence[int], *, window: int, masked: bool, token_budget: int
) -> dict[int, NDArray[np.float64]]:
    """Return the log-probabilities of all tokens at each position, each seen in a window centred on it."""
    starts = {position: _window_start(position, len(wild_type), window) for position in positions}
    groups: dict[int, list[int]] = defaultdict(list)
    for position in positions:
        # Without masks, all positions that see the same window share one forward pass.
        groups[position if masked else starts[position]].append(position)
    passes = list(groups.values())
    rows = [model.tokenizer.encode(wild_type[starts[group[0]] : starts[group[0]] + window]) for group in passes]
    found: dict[int, NDArray[np.float64]] = {}
    for batch in length_sorted_batches([len(row) for row in rows], token_budget=token_budget):
        ids, mask = padded([rows[i] for i in batch], pad_id=model.tokenizer.pad_id, device=model.device)
        places = [(row, position) for row, i in enumerate(batch) for position in passes[i]]
        at = ([row for row, _ in places], [1 + position - starts[position] for _, position in places])
        if masked:
            ids[at] = ProteinTokenizer.mask_id
        log_probs = model(ids, attention_mask=mask).logits[at].float().log_softmax(dim=-1).double().cpu().numpy()
        found.update({position: values for (_, position), values in zip(places, log_probs, strict=True)})
    return found


def _window_start(position: int, length: int, window: int) -> int:
    """Return where a window of `window` residues begins that is centred on `position` as far as the ends allow."""
    return max(0, min(position - window // 2, length - window))
