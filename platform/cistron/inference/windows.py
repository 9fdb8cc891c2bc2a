"""A small variant and the sequences around it, or the reason why it cannot be scored.

Nothing is scored silently wrong: a window is cut only where the contig ends, and both its sequences have the same
flanks. Letters of the reference are read in upper case; N and the ambiguity codes stay as they are, and are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cistron.alphabets import IUPAC_NUCLEOTIDES, NUCLEOTIDES
from cistron.errors import InputError
from cistron.io.reference import Contig, ReferenceGenome, open_reference

ProblemStatus: TypeAlias = Literal[
    "no_alt",
    "symbolic_allele",
    "invalid_allele",
    "unknown_contig",
    "outside_contig",
    "outside_reference",
    "ref_mismatch",
    "allele_too_long",
    "invalid_window",
    "ambiguous_window",
]
"""Why a variant has no score.

no_alt: ``.``, the site does not vary. symbolic_allele: ``<DEL>``, ``*`` or a breakend. invalid_allele: an allele with a
letter other than A C G T N. unknown_contig: no record, or no single record, of that name. outside_contig: a position
beyond its ends. outside_reference: the window goes beyond the region that the reference holds. ref_mismatch: the
reference has another allele there. allele_too_long: the alleles do not fit the window. invalid_window: a letter that
is no nucleotide code. ambiguous_window: more letters other than A C G T than allowed.
"""

_ALLELE_LETTERS: Final = frozenset(NUCLEOTIDES + "N")
_MOST_SHOWN: Final = 40
_WINDOW_LETTERS: Final = frozenset(IUPAC_NUCLEOTIDES)
_CONCRETE: Final = str.maketrans("RYSWKMBDHV", "ACCAGACAAA")
"""The base that VCF 4.3 puts for an ambiguous reference letter: the first of its alphabet order."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A small variant; `pos` is 1-based, alleles are plain letters."""

    chrom: str
    pos: int
    ref: str
    alt: str

    def __str__(self) -> str:
        return f"{self.chrom}:{self.pos} {_shown(self.ref)}>{_shown(self.alt)}"


@dataclass(frozen=True, slots=True)
class Window:
    """The sequences around a variant, in upper case."""

    reference: str
    alternative: str

    @property
    def ambiguous(self) -> int:
        """Letters of the reference that are none of A, C, G and T."""
        return len(self.reference) - sum(map(self.reference.count, NUCLEOTIDES))


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a variant cannot be scored; the message names it."""

    status: ProblemStatus
    message: str


def find_window(variant: Variant, genome: ReferenceGenome, *, window: int) -> Window | Problem:
    """Return the sequences around a variant.

    The window is centred on `pos` and cut at the contig's ends. The longer of the two sequences has at most `window`
    letters: an insertion shortens the flank behind it.
    """
    if problem := allele_problem(variant):
        return problem
    try:
        contig = genome.contig(variant.chrom)
    except InputError as error:
        return Problem("unknown_contig", f"{variant}: {error}")
    found = _bounds(variant, contig, window) or _mismatch(variant, genome, contig)
    if isinstance(found, Problem):
        return found
    start, stop = variant.pos - 1, variant.pos - 1 + len(variant.ref)
    left, right = _flanks(variant, contig, window)
    before, after = genome.fetch(contig, left, start), genome.fetch(contig, stop, right)
    for place, flank in ((left, before), (stop, after)):
        if strange := set(flank) - _WINDOW_LETTERS:
            letter = min(strange, key=flank.index)
            where = f"{letter!r} at {place + flank.index(letter) + 1:,}"
            return Problem("invalid_window", f"{variant}: the reference has {where}, which is no nucleotide code")
    return Window(before + variant.ref.upper() + after, before + variant.alt.upper() + after)


def variant_windows(variant: Variant, contig: str, *, window: int) -> tuple[str, str]:
    """Return the sequences around a variant of a contig, with its reference and its alternative allele.

    Raises:
        InputError: there are none; the reason is the message of :func:`find_window`.
    """
    found = find_window(variant, open_reference({variant.chrom: contig}), window=window)
    if isinstance(found, Problem):
        raise InputError(found.message)
    return found.reference, found.alternative


def allele_problem(variant: Variant) -> Problem | None:
    """Return why the alleles cannot be put into a sequence, or None."""
    if variant.alt in ("", "."):
        return Problem("no_alt", f"{variant}: there is no alternative allele")
    if variant.alt == "*" or set(variant.alt) & set("<>[]"):
        return Problem("symbolic_allele", f"{variant}: {variant.alt!r} is no sequence of letters")
    for name, allele in (("ref", variant.ref), ("alt", variant.alt)):
        if not allele or set(allele.upper()) - _ALLELE_LETTERS:
            return Problem("invalid_allele", f"{variant}: {name} must be letters of {NUCLEOTIDES}N, got {allele!r}")
    return None


def _bounds(variant: Variant, contig: Contig, window: int) -> Problem | None:
    """Return what is wrong with a variant's place, or None."""
    start, stop = variant.pos - 1, variant.pos - 1 + len(variant.ref)
    left, right = start - window // 2, _right(variant, window)
    if contig.is_region and (max(0, left) < contig.start or right > contig.stop):
        held = f"{contig.start + 1:,} to {contig.stop:,}"
        needed = f"{max(0, left) + 1:,} to {right:,}"
        return Problem("outside_reference", f"{variant}: needs {needed}, but the reference holds {held} only")
    if start < contig.start or stop > contig.stop:
        size = f"{contig.stop - contig.start:,}"
        return Problem("outside_contig", f"{variant}: outside {variant.chrom}, which has {size} letters")
    if right < stop:
        return Problem("allele_too_long", f"{variant}: alleles do not fit a window of {window:,}")
    return None


def _mismatch(variant: Variant, genome: ReferenceGenome, contig: Contig) -> Problem | None:
    start = variant.pos - 1
    found = genome.fetch(contig, start, start + len(variant.ref))
    ref, expected = variant.ref.upper(), found.translate(_CONCRETE)
    if ref == expected:
        return None
    message = f"{variant}: the reference has {_shown(found)!r} there, not {_shown(variant.ref)!r}"
    if len(ref) > 1:
        place = next(i for i, letter in enumerate(ref) if letter != expected[i])
        message += f"; the first difference is {found[place]} instead of {ref[place]} at {variant.pos + place}"
    return Problem("ref_mismatch", message)


def _shown(allele: str) -> str:
    """Return an allele for a message, which a long one would drown."""
    return allele if len(allele) <= _MOST_SHOWN else f"{allele[:_MOST_SHOWN]}... ({len(allele):,} letters)"


def _flanks(variant: Variant, contig: Contig, window: int) -> tuple[int, int]:
    """Return where the window begins and ends, within the contig."""
    return max(contig.start, variant.pos - 1 - window // 2), min(contig.stop, _right(variant, window))


def _right(variant: Variant, window: int) -> int:
    """Return where the window ends on an endless contig."""
    return variant.pos - 1 + window - window // 2 - max(0, len(variant.alt) - len(variant.ref))
