"""Effect of amino-acid substitutions under ESM-2, by the three published strategies.

These are of Meier et al. 2021 (doi:10.1101/2021.07.09.450648). ``masked-marginal``: mask each mutated position alone
and compare the two residues' log-probabilities there. ``wt-marginal``: the same from the unmasked wild type. ``pseudo-
ppl``: the mutant's pseudo-log-likelihood minus the wild type's. The first two add up over the substitutions of a
multiple mutant. Log-probabilities are over all 33 tokens, on which the difference of two does not depend. Long
proteins: see :mod:`cistron.inference.protein_windows`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cistron.alphabets import AMINO_ACIDS, STANDARD_AMINO_ACIDS, validate_protein
from cistron.errors import InputError
from cistron.inference.batching import TOKEN_BUDGET, check_token_budget, length_sorted_batches, packed
from cistron.inference.finite import without_nan
from cistron.inference.masked import check_unmasked, log_probs_at, masked_log_probs, residue_ids, with_ends
from cistron.inference.protein_variants import Substitution, mutated, parse_variant
from cistron.inference.protein_windows import overlapping_windows, residues_per_window
from cistron.models.base import SequenceModel

MarginalStrategy: TypeAlias = Literal["masked-marginal", "wt-marginal"]
# Flat, not a union with the marginals: of a union, pydantic reports a wrong value once per member.
ProteinStrategy: TypeAlias = Literal["masked-marginal", "wt-marginal", "pseudo-ppl"]

RESIDUE_ORDER: Final = STANDARD_AMINO_ACIDS
"""Residues of the columns of a substitution matrix."""


@torch.inference_mode()
def substitution_matrix(
    model: SequenceModel,
    sequence: str,
    *,
    strategy: MarginalStrategy = "masked-marginal",
    positions: Sequence[int] | None = None,
    window: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> NDArray[np.float64]:
    """Score every single substitution of a protein: a deep mutational scan without the experiment.

    Args:
        model: ESM-2.
        sequence: the wild type, of L residues.
        strategy: ``masked-marginal``, in L masked passes; ``wt-marginal``, in one pass per window.
        positions: 0-based residues to replace, whose rows are returned in this order, again where one is repeated; all
            L unless given.
        window: residues that the model sees at once; its trained length unless given.
        token_budget: most tokens of one forward pass, padding included.

    Returns:
        [L, 20] log p(mutant) - log p(wild type), columns in the order of :data:`RESIDUE_ORDER`; 0 for the wild type.

    Raises:
        InputError: the model is not ESM-2, an unknown strategy, a position that is outside or no integer, or a window
            that is no number of residues.
        SequenceError: the wild type is not a protein, or holds ``<mask>`` or gaps.
    """
    check_token_budget(token_budget)
    if strategy not in get_args(MarginalStrategy):
        raise InputError(f"strategy must be one of {', '.join(get_args(MarginalStrategy))}, got {strategy!r}")
    wild_type = _wild_type(model, sequence, name="sequence")
    ids = residue_ids(model, wild_type)
    chosen = np.arange(len(ids)) if positions is None else _checked_positions(positions, length=len(ids))
    distinct, rows = np.unique(chosen, return_inverse=True)
    found = _log_probs(model, ids, distinct.tolist(), strategy=strategy, window=window, token_budget=token_budget)
    log_probs = found[rows]
    columns = residue_ids(model, RESIDUE_ORDER)
    return log_probs[:, columns] - np.take_along_axis(log_probs, ids[chosen, None], axis=1)


def score_substitutions(
    model: SequenceModel,
    variants: Sequence[Any],
    reference: Any,
    *,
    window: int | None,
    strategy: str,
    token_budget: int,
) -> pa.Table:
    """Score variants of one protein; returns columns variant, as it was written, and score.

    Args:
        model: ESM-2.
        variants: as in :mod:`cistron.inference.protein_variants`.
        reference: the wild-type sequence.
        window: residues that the model sees at once; its trained length if None.
        strategy: one of :data:`ProteinStrategy`.
        token_budget: most tokens of one forward pass, padding included.

    Raises:
        InputError: an unknown strategy, or a variant that is malformed or contradicts the wild type.
        SequenceError: the wild type is not a protein, or holds ``<mask>`` or gaps.
    """
    if strategy not in get_args(ProteinStrategy):
        raise InputError(f"strategy must be one of {', '.join(get_args(ProteinStrategy))}, got {strategy!r}")
    wild_type = _wild_type(model, reference, name="reference")
    parsed = [parse_variant(variant, wild_type, name=f"variant {index}") for index, variant in enumerate(variants)]
    if strategy == "pseudo-ppl":
        scores = _pseudo_likelihood_changes(model, parsed, wild_type, window=window, token_budget=token_budget)
    else:
        scores = _marginals(model, parsed, wild_type, strategy=strategy, window=window, token_budget=token_budget)
    return pa.table({"variant": pa.array(list(variants), pa.string()), "score": pa.array(scores, pa.float64())})


def _wild_type(model: SequenceModel, sequence: str, *, name: str) -> str:
    if model.family != "esm2":
        raise InputError(f"substitutions of residues need an ESM-2 model, and this is {model.family}")
    if not isinstance(sequence, str):
        raise InputError(f"{name} must be the wild-type protein sequence, got a {type(sequence).__name__}")
    wild_type = model.tokenizer.validate(sequence, name=name)
    check_wild_type(wild_type, name=name)
    return wild_type


def check_wild_type(protein: str, *, name: str) -> None:
    """Raise ``SequenceError`` where a protein that ESM-2 reads has ``<mask>``, or gaps, which positions would count."""
    check_unmasked(protein, name=name)
    validate_protein(protein, name=name)


def _checked_positions(positions: Sequence[int], *, length: int) -> NDArray[np.int64]:
    """Return the positions asked for, [positions] int64."""
    if isinstance(positions, str) or not isinstance(positions, Iterable):
        raise InputError(f"positions must be a list of 0-based integers, got {positions!r}")
    chosen = []
    for position in positions:
        try:
            chosen.append(operator.index(position))  # numpy's integers too
        except TypeError as error:
            raise InputError(f"positions must be 0-based integers, got {position!r}") from error
        if not 0 <= chosen[-1] < length:
            raise InputError(f"position {chosen[-1]} is outside the protein, which has {length} residues")
    return np.array(chosen, dtype=np.int64)


def _pseudo_likelihood_changes(
    model: SequenceModel,
    variants: Sequence[list[Substitution]],
    wild_type: str,
    *,
    window: int | None,
    token_budget: int,
) -> list[float]:
    mutants = [mutated(wild_type, substitutions) for substitutions in variants]
    unique = list(dict.fromkeys([wild_type, *mutants]))
    values = masked_log_probs(model, unique, window=window, token_budget=token_budget)
    likelihood = {sequence: float(v.sum(dtype=np.float64)) for sequence, v in zip(unique, values, strict=True)}
    return [likelihood[mutant] - likelihood[wild_type] for mutant in mutants]


def _marginals(
    model: SequenceModel,
    variants: Sequence[list[Substitution]],
    wild_type: str,
    *,
    strategy: str,
    window: int | None,
    token_budget: int,
) -> list[float]:
    """Sum the substitutions of each variant; a position that many variants share is looked at once."""
    positions = sorted({substitution.position for substitutions in variants for substitution in substitutions})
    ids = residue_ids(model, wild_type)
    found = _log_probs(model, ids, positions, strategy=strategy, window=window, token_budget=token_budget)
    table = dict(zip(positions, found, strict=True))
    letters = dict(zip(AMINO_ACIDS, residue_ids(model, AMINO_ACIDS), strict=True))
    return [
        float(sum(table[s.position][letters[s.mutant]] - table[s.position][letters[s.wild_type]] for s in variant))
        for variant in variants
    ]


def _log_probs(
    model: SequenceModel,
    ids: NDArray[np.int64],
    positions: Sequence[int],
    *,
    strategy: str,
    window: int | None,
    token_budget: int,
) -> NDArray[np.float64]:
    """Return the log-probabilities of all tokens at the positions, no two of which are equal, [positions, V]."""
    if strategy == "wt-marginal":
        return _unmasked_log_probs(model, ids, window=window, token_budget=token_budget)[list(positions)]
    values = np.empty((len(positions), model.tokenizer.vocab_size))
    rows = {position: row for row, position in enumerate(positions)}
    places = [(0, position) for position in positions]
    for chosen, log_probs in log_probs_at(model, [ids], places, window=window, token_budget=token_budget):
        values[[rows[position] for _, position in chosen]] = log_probs
    return values


def _unmasked_log_probs(
    model: SequenceModel, ids: NDArray[np.int64], *, window: int | None, token_budget: int
) -> NDArray[np.float64]:
    """Return the log-probabilities at every residue of the unmasked protein, [L, V], windows stitched."""
    values = np.zeros((len(ids), model.tokenizer.vocab_size))
    windows = overlapping_windows(len(ids), window=residues_per_window(model, window, longest=len(ids)))
    rows = [with_ends(ids[part.start : part.stop]) for part in windows]
    for batch in length_sorted_batches([len(row) for row in rows], token_budget=token_budget):
        tokens, cu_seqlens = packed([rows[i] for i in batch], device=model.device)
        logits = model(tokens, cu_seqlens=cu_seqlens).logits
        found = without_nan(logits.float().log_softmax(dim=-1).double().cpu().numpy())
        for part, log_probs in zip(
            (windows[i] for i in batch), np.split(found, cu_seqlens[1:-1].tolist()), strict=True
        ):
            weights = 1.0 if part.weights is None else part.weights[:, None]
            values[part.start : part.stop] += weights * log_probs[1:-1]
    return values
