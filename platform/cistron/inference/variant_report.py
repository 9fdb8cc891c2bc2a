"""Variants as they come in a file: each gets a score, or a status that says why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from cistron.inference.batching import TOKEN_BUDGET
from cistron.inference.variants import score_windows
from cistron.inference.windows import Problem, Variant, Window, find_window
from cistron.io.reference import ReferenceGenome
from cistron.models.base import SequenceModel

SCORED: Final = "scored"
MAX_AMBIGUOUS: Final = 0.5
"""Share of a window that may be other than A, C, G and T."""

REPORT_SCHEMA: Final = pa.schema(
    [
        ("chrom", pa.string()),
        ("pos", pa.int64()),
        ("ref", pa.string()),
        ("alt", pa.string()),
        ("score", pa.float64()),
        ("ref_score", pa.float64()),
        ("alt_score", pa.float64()),
        ("mean_score", pa.float64()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("window_letters", pa.int64()),
        ("ambiguous_letters", pa.int64()),
    ]
)
"""Columns of a report.

score: change of the log-likelihood, nats. mean_score: the same of the mean per nucleotide, as published analyses have
it. detail: the status in a sentence. window_letters: letters of the reference window; fewer than asked for near a
contig's end. ambiguous_letters: those of them that are none of A, C, G and T.
"""


def report_variants(
    model: SequenceModel,
    variants: Sequence[Variant],
    genome: ReferenceGenome,
    *,
    window: int,
    reverse_complement: bool = False,
    max_ambiguous: float = MAX_AMBIGUOUS,
    token_budget: int = TOKEN_BUDGET,
) -> pa.Table:
    """Score the variants that can be scored; return one row each, in their order.

    Args:
        model: Evo 2.
        variants: with alleles as a VCF file has them, symbolic ones and ``.`` included.
        genome: the assembly that they refer to.
        window: nucleotides of context.
        reverse_complement: average both strands.
        max_ambiguous: share of the window that may be other than A, C, G and T.
        token_budget: most tokens of one forward pass, padding included.
    """
    found = [examined(variant, genome, window=window, max_ambiguous=max_ambiguous) for variant in variants]
    windows = {row: item for row, item in enumerate(found) if isinstance(item, Window)}
    columns: dict[str, list[object]] = {name: [None] * len(found) for name in REPORT_SCHEMA.names}
    for name in ("chrom", "pos", "ref", "alt"):
        columns[name] = [getattr(variant, name) for variant in variants]
    if windows:
        scores = score_windows(
            model, list(windows.values()), reverse_complement=reverse_complement, token_budget=token_budget
        )
        pairs = zip(windows.items(), scores.reference.tolist(), scores.alternative.tolist(), strict=True)
        for (row, scored), reference, alternative in pairs:
            _fill(columns, row, _scores(scored, reference, alternative))
    for row, item in enumerate(found):
        if isinstance(item, Problem):
            _fill(columns, row, {"status": item.status, "detail": item.message})
    return pa.table(columns, schema=REPORT_SCHEMA)


def examined(variant: Variant, genome: ReferenceGenome, *, window: int, max_ambiguous: float) -> Window | Problem:
    """Return the sequences around a variant, or why it is not to be scored."""
    found = find_window(variant, genome, window=window)
    if isinstance(found, Window) and found.ambiguous > max_ambiguous * len(found.reference):
        share = f"{found.ambiguous:,} of {len(found.reference):,} letters"
        return Problem("ambiguous_window", f"{variant}: {share} around it are none of A, C, G and T")
    return found


def _scores(window: Window, reference: float, alternative: float) -> dict[str, object]:
    """Return the columns of a scored variant; a sequence of one letter has no mean."""
    means = [
        total / (len(sequence) - 1) if len(sequence) > 1 else np.nan
        for total, sequence in ((reference, window.reference), (alternative, window.alternative))
    ]
    return {
        "score": alternative - reference,
        "ref_score": reference,
        "alt_score": alternative,
        "mean_score": means[1] - means[0],
        "status": SCORED,
        "window_letters": len(window.reference),
        "ambiguous_letters": window.ambiguous,
    }


def _fill(columns: dict[str, list[object]], row: int, values: dict[str, object]) -> None:
    for name, value in values.items():
        columns[name][row] = value
