"""Effect of a variant: how much less (or more) likely the sequence becomes.

DNA: the log-likelihood of a window with the alternative allele minus that with the reference allele, both with the same
flanks. Protein: see :mod:`cistron.inference.substitutions`. Negative means that the model finds the variant worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow as pa
import torch

from cistron.alphabets import NUCLEOTIDES
from cistron.alphabets import reverse_complement as reverse_complemented
from cistron.errors import InputError
from cistron.inference.batching import TOKEN_BUDGET, check_token_budget
from cistron.inference.score import sequence_log_probs
from cistron.inference.substitutions import ProteinStrategy, score_substitutions
from cistron.io.fasta import read_fasta
from cistron.models.base import SequenceModel
from cistron.models.families import config_of

Strategy: TypeAlias = Literal["delta"] | ProteinStrategy

DNA_WINDOW: Final = 8192
PROTEIN_WINDOW: Final = 1022
"""Default context in nucleotides and residues: what the base models were trained on."""


@runtime_checkable
class VariantLike(Protocol):
    """A variant as a VCF line states it."""

    chrom: str
    pos: int
    """1-based position of the first letter of `ref`."""
    ref: str
    alt: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A small variant; `pos` is 1-based, alleles are plain letters."""

    chrom: str
    pos: int
    ref: str
    alt: str

    def __str__(self) -> str:
        return f"{self.chrom}:{self.pos}{self.ref}>{self.alt}"


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
            several joined by ``:``.
        reference: for DNA, a FASTA file or a mapping of names to sequences, whose case is ignored: soft-masking must
            not look like a mutation; for protein, the wild-type sequence.
        window: letters of context around the variant; if not given, 8192 nucleotides (or the model's
            limit, if that is lower) or 1022 residues.
        strategy: DNA has only ``delta``; protein has ``masked-marginal`` (the default), ``wt-marginal`` and
            ``pseudo-ppl``.
        reverse_complement: DNA only; average the effect over both strands.
        token_budget: most tokens of one forward pass, padding included.

    Returns:
        DNA: chrom, pos, ref, alt, ref_score, alt_score (summed log-likelihoods) and score, their difference.
        Protein: variant and score.

    Raises:
        InputError: an empty request, an option that does not apply, a variant that is malformed, outside the reference
            or whose reference allele is not what the reference holds; names the variant.
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
        size = PROTEIN_WINDOW if window is None else window
        chosen = "masked-marginal" if strategy is None else strategy
        return score_substitutions(model, requested, reference, window=size, strategy=chosen, token_budget=token_budget)
    if strategy not in (None, "delta"):
        raise InputError(f"strategy {strategy!r} is for proteins; DNA has 'delta'")
    limit = config_of(model).max_length
    size = min(DNA_WINDOW, limit) if window is None else _checked_window(window, limit)
    parsed = [_parsed(index, variant) for index, variant in enumerate(requested)]
    windows = _windows(parsed, reference, size)
    return _delta_table(model, parsed, windows, reverse_complement=reverse_complement, token_budget=token_budget)


def variant_windows(variant: Variant, contig: str, *, window: int) -> tuple[str, str]:
    """Return the sequences around a variant with its reference and its alternative allele, in upper case.

    The window is centred on `pos` and cut at the contig's ends. Both sequences have the same flanks, and the longer one
    has at most `window` letters.

    Raises:
        InputError: the position is outside the contig, `ref` is not there, or the allele does not fit the window.
    """
    start = variant.pos - 1
    stop = start + len(variant.ref)
    if start < 0 or stop > len(contig):
        raise InputError(f"{variant}: outside {variant.chrom}, which has {len(contig):,} letters")
    found = contig[start:stop].upper()
    if found != variant.ref.upper():
        raise InputError(f"{variant}: the reference has {found!r} there, not {variant.ref!r}")
    left = max(0, start - window // 2)
    right = min(len(contig), start + window - window // 2 - max(0, len(variant.alt) - len(variant.ref)))
    if right < stop:
        raise InputError(f"{variant}: alleles do not fit a window of {window:,}")
    before, after = contig[left:start].upper(), contig[stop:right].upper()
    return before + variant.ref.upper() + after, before + variant.alt.upper() + after


def _checked_window(window: int, max_length: int) -> int:
    if not 2 <= window <= max_length:
        raise InputError(f"window must be from 2 to the model's limit of {max_length:,}, got {window}")
    return window


def _parsed(index: int, variant: AnyVariant) -> Variant:
    """Read a variant; `index` is its place in the request."""
    if isinstance(variant, VariantLike):
        parsed = Variant(variant.chrom, variant.pos, variant.ref, variant.alt)
    elif isinstance(variant, tuple | list) and len(variant) == 4:
        parsed = Variant(*variant)
    else:
        raise InputError(f"variant {index}: must be (chrom, pos, ref, alt), got {variant!r}")
    if not isinstance(parsed.pos, int):
        raise InputError(f"variant {index}: pos must be a whole number, got {parsed.pos!r}")
    for name, allele in (("ref", parsed.ref), ("alt", parsed.alt)):
        if not isinstance(allele, str) or not allele or set(allele.upper()) - set(NUCLEOTIDES + "N"):
            raise InputError(f"variant {index} ({parsed}): {name} must be letters of {NUCLEOTIDES}N, got {allele!r}")
    return parsed


def _windows(variants: Sequence[Variant], reference: Reference, size: int) -> list[tuple[str, str]]:
    contigs = _contigs(reference, {variant.chrom for variant in variants})
    return [variant_windows(variant, contigs[variant.chrom], window=size) for variant in variants]


def _contigs(reference: Reference, names: set[str]) -> Mapping[str, str]:
    """Return the named sequences of a mapping or FASTA file."""
    if isinstance(reference, Mapping):
        contigs: Mapping[str, str] = reference
    else:
        contigs = {record.name: record.sequence for record in read_fasta(reference) if record.name in names}
    if missing := sorted(names - contigs.keys()):
        raise InputError(f"the reference has no sequence named {missing[0]!r}")
    return contigs


def _delta_table(
    model: SequenceModel,
    variants: Sequence[Variant],
    windows: Sequence[tuple[str, str]],
    *,
    reverse_complement: bool,
    token_budget: int,
) -> pa.Table:
    # Alternatives at one place share their reference window, which is scored once.
    unique = list(dict.fromkeys(sequence for pair in windows for sequence in pair))
    strands = [unique, [reverse_complemented(sequence) for sequence in unique]] if reverse_complement else [unique]
    sums = np.mean(
        [
            [values.sum(dtype=np.float64) for values in sequence_log_probs(model, strand, token_budget=token_budget)]
            for strand in strands
        ],
        axis=0,
    )
    scores = dict(zip(unique, sums.tolist(), strict=True))
    ref_scores = np.array([scores[ref] for ref, _ in windows])
    alt_scores = np.array([scores[alt] for _, alt in windows])
    return pa.table(
        {
            "chrom": pa.array([variant.chrom for variant in variants], pa.string()),
            "pos": pa.array([variant.pos for variant in variants], pa.int64()),
            "ref": pa.array([variant.ref for variant in variants], pa.string()),
            "alt": pa.array([variant.alt for variant in variants], pa.string()),
            "ref_score": ref_scores,
            "alt_score": alt_scores,
            "score": alt_scores - ref_scores,
        }
    )
