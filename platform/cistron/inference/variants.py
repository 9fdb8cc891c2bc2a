"""Effect of a variant: how much less (or more) likely the sequence becomes.

DNA: the log-likelihood of a window with the alternative allele minus that with the reference allele, both with the same
flanks; what the alleles of a place have before them in common is read once. Protein: see
:mod:`cistron.inference.substitutions`. Negative means that the model finds the variant worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cistron.alphabets import NUCLEOTIDES
from cistron.alphabets import reverse_complement as reverse_complemented
from cistron.errors import InputError
from cistron.inference.batching import TOKEN_BUDGET, check_token_budget
from cistron.inference.prefix import shared_prefix_sums
from cistron.inference.substitutions import ProteinStrategy, score_substitutions
from cistron.inference.windows import Problem, Variant, Window, find_window, variant_windows
from cistron.io.reference import ReferenceGenome, open_reference
from cistron.models.base import SequenceModel
from cistron.models.evo2.model import Evo2
from cistron.models.families import config_of

__all__ = ["Variant", "VariantLike", "WindowScores", "score_variants", "score_windows", "variant_windows"]

Strategy: TypeAlias = Literal["delta"] | ProteinStrategy

DNA_WINDOW: Final = 8192
"""Default context in nucleotides: what the base models were trained on."""


@runtime_checkable
class VariantLike(Protocol):
    """A variant as a VCF line states it."""

    chrom: str
    pos: int
    """1-based position of the first letter of `ref`."""
    ref: str
    alt: str


AnyVariant: TypeAlias = VariantLike | tuple[str, int, str, str] | str
Reference: TypeAlias = str | Path | Mapping[str, str]


@torch.inference_mode()
def score_variants(
    model: SequenceModel,
    variants: Iterable[AnyVariant],
    reference: Reference,
    *,
    window: int | None = None,
    strategy: Strategy | None = None,
    reverse_complement: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> pa.Table:
    """Score variants; rows come in the order of the request.

    Args:
        model: Evo 2 or ESM-2.
        variants: for DNA, objects or tuples of (chrom, pos 1-based, ref, alt); for protein, strings such as ``A23T``,
            several joined by ``:``, or HGVS (:mod:`cistron.inference.protein_variants`).
        reference: for DNA, a FASTA file or a mapping of names to sequences, whose case is ignored: soft-masking must
            not look like a mutation; names of contigs and reading by region are those of
            :mod:`cistron.io.reference`. For protein, the wild-type sequence.
        window: letters of context around the variant; if not given, 8192 nucleotides (or the model's
            limit, if that is lower) or the residues that ESM-2 saw in training, 1022.
        strategy: DNA has only ``delta``; protein has ``masked-marginal`` (the default), ``wt-marginal`` and
            ``pseudo-ppl``.
        reverse_complement: DNA only; average the effect over both strands.
        token_budget: most tokens of one forward pass, padding included.

    Returns:
        DNA: chrom, pos, ref, alt, ref_score, alt_score (summed log-likelihoods) and score, their difference;
        window_letters, fewer than asked for at a contig's end, and how many of them are none of A, C, G and T,
        ambiguous_letters.
        Protein: variant and score.

    Raises:
        InputError: an empty request, an option that does not apply, a variant that is malformed, outside the reference
            or whose reference allele is not what the reference holds; names the variant.
        CapabilityError: the model returned NaN.
    """
    check_token_budget(token_budget)
    if isinstance(variants, str):
        raise InputError("variants: give a list, not one string")
    requested = list(variants)
    if not requested:
        raise InputError("variants: the request is empty")
    if model.family == "esm2":
        if reverse_complement:
            raise InputError(f"reverse_complement applies to DNA models, and this is {model.family}")
        chosen = "masked-marginal" if strategy is None else strategy
        return score_substitutions(
            model, requested, reference, window=window, strategy=chosen, token_budget=token_budget
        )
    if strategy not in (None, "delta"):
        raise InputError(f"strategy {strategy!r} is for proteins; DNA has 'delta'")
    size = checked_window(model, window)
    parsed = [_parsed(index, variant) for index, variant in enumerate(requested)]
    genome = open_reference(reference)
    windows = [_window(variant, genome, size) for variant in parsed]
    scores = score_windows(model, windows, reverse_complement=reverse_complement, token_budget=token_budget)
    return _delta_table(parsed, windows, scores)


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Summed log-likelihoods of the windows of a request, in its order.

    Attributes:
        reference: [N] float64, with the reference allele.
        alternative: [N] float64, with the alternative allele.
        num_references: distinct reference windows; each was scored once.
    """

    reference: NDArray[np.float64]
    alternative: NDArray[np.float64]
    num_references: int


def score_windows(
    model: SequenceModel,
    windows: Sequence[Window],
    *,
    reverse_complement: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> WindowScores:
    """Score the two sequences of each window; what sequences begin with alike is read once.

    Args:
        model: Evo 2.
        windows: at least one.
        reverse_complement: average both strands. The other strand's common beginning is the flank behind the variant.
        token_budget: most tokens of one forward pass, padding included.
    """
    if not isinstance(model, Evo2):
        raise InputError(f"windows of DNA are scored with Evo 2, and this is {model.family}")
    forward = [sequence for window in windows for sequence in (window.reference, window.alternative)]
    backward = [reverse_complemented(sequence) for sequence in forward] if reverse_complement else forward
    distinct = list(dict.fromkeys(forward + backward))
    sums = dict(zip(distinct, shared_prefix_sums(model, distinct, token_budget=token_budget).tolist(), strict=True))
    means = np.array([(sums[one] + sums[other]) / 2 for one, other in zip(forward, backward, strict=True)])
    return WindowScores(means[::2], means[1::2], len({window.reference for window in windows}))


def checked_window(model: SequenceModel, window: int | None) -> int:
    """Return the nucleotides of context; 8192, or the model's limit if that is lower, if none are given.

    Raises:
        InputError: fewer than two, or more than the model reads.
    """
    limit = config_of(model).max_length
    if window is None:
        return min(DNA_WINDOW, limit)
    if not isinstance(window, Integral) or not 2 <= window <= limit:
        raise InputError(f"window must be from 2 to the model's limit of {limit:,}, got {window!r}")
    return int(window)


def _parsed(index: int, variant: AnyVariant) -> Variant:
    """Read a variant; `index` is its place in the request."""
    if isinstance(variant, VariantLike):
        parsed = Variant(variant.chrom, variant.pos, variant.ref, variant.alt)
    elif isinstance(variant, tuple | list) and len(variant) == 4:
        parsed = Variant(*variant)
    else:
        raise InputError(f"variant {index}: must be (chrom, pos, ref, alt), got {variant!r}")
    if not isinstance(parsed.pos, Integral):
        raise InputError(f"variant {index}: pos must be a whole number, got {parsed.pos!r}")
    parsed = replace(parsed, pos=int(parsed.pos))
    for name, allele in (("ref", parsed.ref), ("alt", parsed.alt)):
        if not isinstance(allele, str) or not allele or set(allele.upper()) - set(NUCLEOTIDES + "N"):
            where = f"variant {index} ({parsed.chrom}:{parsed.pos})"
            raise InputError(f"{where}: {name} must be letters of {NUCLEOTIDES}N, got {allele!r}")
    return parsed


def _window(variant: Variant, genome: ReferenceGenome, size: int) -> Window:
    found = find_window(variant, genome, window=size)
    if isinstance(found, Problem):
        raise InputError(found.message)
    return found


def _delta_table(variants: Sequence[Variant], windows: Sequence[Window], scores: WindowScores) -> pa.Table:
    return pa.table(
        {
            "chrom": pa.array([variant.chrom for variant in variants], pa.string()),
            "pos": pa.array([variant.pos for variant in variants], pa.int64()),
            "ref": pa.array([variant.ref for variant in variants], pa.string()),
            "alt": pa.array([variant.alt for variant in variants], pa.string()),
            "ref_score": scores.reference,
            "alt_score": scores.alternative,
            "score": scores.alternative - scores.reference,
            "window_letters": pa.array([len(window.reference) for window in windows], pa.int64()),
            "ambiguous_letters": pa.array([window.ambiguous for window in windows], pa.int64()),
        }
    )
