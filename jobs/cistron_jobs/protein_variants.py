"""Score substitutions in proteins with ESM-2: those of a table, or all 20 residues at every position."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cistron.errors import InputError
from cistron.inference.protein_windows import check_window
from cistron.inference.substitutions import RESIDUE_ORDER, substitution_matrix
from cistron.inference.variants import score_variants
from cistron.io import storage
from cistron.models.base import SequenceModel
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.model_config import model_shell
from cistron_jobs.protein_variant_parts import ProteinVariantsConfig, range_parts, variant_parts, variant_problem

logger = logging.getLogger(__name__)

SCORED: Final = "scored"


def run(config: ProteinVariantsConfig) -> str:
    """Score the variants; return the output.

    Raises:
        CistronError: an input that cannot be used; a setting that does not apply.
    """
    model = model_shell(config)
    if model.family != "esm2":
        raise InputError(f"protein_variants: substitutions need an ESM-2 model, and this is {model.family}")
    check_window(model, config.window)
    job = BulkJob(
        name="protein_variants",
        output=config.output,
        inputs=("reference",) if config.input is None else ("reference", "input"),
        parts=partial(range_parts if config.input is None else variant_parts, config),
        compute=partial(_matrix if config.input is None else _scores, config=config),
    )
    run_bulk(config, job)
    if config.input is not None:
        _log_statuses(config.output)
    return config.output


def _scores(model: SequenceModel, rows: pa.Table, *, config: ProteinVariantsConfig) -> pa.Table:
    """Score the variants of a part, protein by protein."""
    variants, wild_types = rows["variant"].to_pylist(), rows["wild_type"].to_pylist()
    problems = [variant_problem(variant, residues) for variant, residues in zip(variants, wild_types, strict=True)]
    of_protein: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        if problem is None:
            of_protein.setdefault(wild_types[i], []).append(i)
    scores: list[float | None] = [None] * len(variants)
    options: dict[str, Any] = {
        "window": config.window,
        "strategy": config.strategy,
        "token_budget": config.token_budget,
    }
    for residues, indices in of_protein.items():
        found = score_variants(model, [variants[i] for i in indices], residues, **options)["score"]
        for i, score in zip(indices, found.to_pylist(), strict=True):
            scores[i] = score
    statuses = [SCORED if problem is None else problem[0] for problem in problems]
    details = ["" if problem is None else problem[1] for problem in problems]
    columns = rows.drop_columns(["wild_type"]).append_column("score", pa.array(scores, pa.float64()))
    return columns.append_column("status", pa.array(statuses)).append_column("detail", pa.array(details))


def _matrix(model: SequenceModel, ranges: pa.Table, *, config: ProteinVariantsConfig) -> pa.Table:
    """Score all 20 residues at the positions of a part."""
    tables = []
    for row in ranges.to_pylist():
        positions = range(row["start"], row["stop"])
        scores = substitution_matrix(
            model,
            row["wild_type"],
            strategy="wt-marginal" if config.strategy == "wt-marginal" else "masked-marginal",
            positions=positions,
            window=config.window,
            token_budget=config.token_budget,
        )
        columns = {
            "protein": pa.array([row["protein"]] * len(positions), pa.string()),
            "position": pa.array([position + 1 for position in positions], pa.int64()),
            "wild_type": pa.array(list(row["wild_type"][row["start"] : row["stop"]]), pa.string()),
        }
        tables.append(pa.table(columns | dict(zip(RESIDUE_ORDER, map(pa.array, scores.T), strict=True))))
    return pa.concat_tables(tables)


def _log_statuses(output: str) -> None:
    """Say how many variants have a score, and why the others have none."""
    counts, examples = Counter[str](), dict[str, str]()
    with storage.open_input(output) as stream:
        file = pq.ParquetFile(stream)
        for batch in file.iter_batches(columns=["protein", "variant", "status", "detail"]):
            for row in batch.to_pylist():
                counts[row["status"]] += 1
                examples.setdefault(row["status"], f"{row['protein']} {row['variant'] or '(empty)'}: {row['detail']}")
    total, scored = counts.total(), counts.pop(SCORED, 0)
    level = logging.INFO if scored == total else logging.WARNING
    logger.log(level, "protein_variants: %s of %s variants scored", f"{scored:,}", f"{total:,}")
    for status, number in counts.most_common():
        logger.log(level, "protein_variants: %s %s, the first: %s", f"{number:,}", status, examples[status])
