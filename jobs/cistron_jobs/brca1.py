"""``cistron evaluate benchmark=brca1``: from the published table to numbers, pictures and a Parquet file.

The variants are scored by ``cistron variants``, so an interrupted evaluation goes on where it stopped. A positive is a
variant with loss of function, and the score that should find it is the negative change of the log-likelihood. The
baseline beside it ranks the variants by their class of consequence alone.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cistron.config import to_yaml
from cistron.errors import ConfigError, InputError
from cistron.evaluation.brca1 import FUNCTION_CLASSES, EditedVariant, read_edited_variants
from cistron.evaluation.variant_effect import Discrimination, Estimate, consequence_scores, discrimination
from cistron.evaluation.variant_plots import plot_pr, plot_roc, plot_strip
from cistron.inference.variant_report import SCORED
from cistron.inference.variants import checked_window
from cistron.inference.windows import Window, find_window
from cistron.io import storage
from cistron.io.reference import open_reference
from cistron_jobs import variants
from cistron_jobs.model_config import model_shell
from cistron_jobs.variants import VariantsConfig

logger = logging.getLogger(__name__)

MODEL: Final = "model"
BASELINE: Final = "consequence class alone"
_LEAST_IN_SUBSET: Final = 10
"""Variants of each kind that a class of consequence must have to be measured by itself."""
_CLASS_NAMES: Final = {"LOF": "loss of function", "INT": "intermediate", "FUNC": "functional"}


def evaluate(scoring: VariantsConfig, *, table: str, run_dir: str | None, resamples: int, seed: int) -> dict[str, Any]:
    """Score the variants, measure, draw, and return what ``summary.json`` in the run folder holds.

    Args:
        scoring: how; its input and output are put into the run folder.
        table: supplementary table 1 of Findlay 2018.
        run_dir: folder of the run; a new one if not given.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        CistronError: a file that cannot be used, or variants that the reference does not fit.
    """
    # Variants of one place stand together, so that each reference window is computed once.
    rows = sorted(read_edited_variants(table), key=lambda row: (row.variant.chrom, row.variant.pos))
    folder = _folder(run_dir)
    paths = {"input": str(folder / "variants.csv"), "output": str(folder / "variants.parquet")}
    scoring = VariantsConfig.model_validate({**scoring.model_dump(), **paths})
    num_references = _count_references(scoring, rows)
    logger.info("brca1: %s variants in %s distinct reference windows", f"{len(rows):,}", f"{num_references:,}")
    storage.write_text(folder / "config.yaml", to_yaml(scoring))
    storage.write_text(scoring.input, _csv(rows))
    scored = pq.read_table(variants.run(scoring))
    _write_scores(folder / "scores.parquet", rows, scored)
    delta = scored["score"].to_numpy(zero_copy_only=False)
    results = _measured(rows, delta, resamples=resamples, seed=seed)
    compared = {name: results[name] for name in (MODEL, BASELINE)}
    _draw(folder / "report", rows, delta, compared, subtitle=_how(scoring))
    summary = {
        "benchmark": "brca1",
        "settings": {**scoring.model_dump(mode="json"), "data": table, "resamples": resamples, "seed": seed},
        "run_dir": str(folder),
        "num_variants": len(rows),
        "num_reference_windows": num_references,
        "classes": dict(Counter(row.function_class for row in rows)),
        "results": {name: _numbers(result) for name, result in results.items()},
    }
    storage.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summary_text(summary: dict[str, Any]) -> str:
    """Return the numbers as text."""
    head = (
        f"{summary['num_variants']:,} variants, {summary['num_reference_windows']:,} distinct reference windows, "
        "95 % bootstrap intervals"
    )
    width = max(map(len, summary["results"]))
    lines = [
        f"  {name:<{width}}  AUROC {Estimate(**result['auroc'])}  AUPRC {Estimate(**result['auprc'])}"
        f"  n = {result['num_positives']:,} + {result['num_negatives']:,}"
        for name, result in summary["results"].items()
    ]
    return "\n".join([head, *lines, f"  {summary['run_dir']}", ""])


def _folder(run_dir: str | None) -> Path:
    if run_dir is not None and "://" in run_dir:
        raise ConfigError(f"run_dir: the pictures are drawn into a local folder, got {run_dir}")
    return Path(run_dir or f"runs/brca1-{datetime.now(UTC):%Y%m%d-%H%M%S}").expanduser().absolute()


def _count_references(scoring: VariantsConfig, rows: Sequence[EditedVariant]) -> int:
    """Return how many reference windows there are; stop before anything is computed if a variant has none."""
    genome, size = open_reference(scoring.reference), checked_window(model_shell(scoring), scoring.window)
    distinct = set()
    for number, row in enumerate(rows, 1):
        found = find_window(row.variant, genome, window=size)
        if not isinstance(found, Window):
            raise InputError(f"variant {number} of the table, by position: {found.message} ({found.status})")
        distinct.add(found.reference)
    return len(distinct)


def _csv(rows: Sequence[EditedVariant]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["chrom", "pos", "ref", "alt"])
    writer.writerows((row.variant.chrom, row.variant.pos, row.variant.ref, row.variant.alt) for row in rows)
    return text.getvalue()


def _write_scores(path: Path, rows: Sequence[EditedVariant], scored: pa.Table) -> None:
    """Write the scores beside what the experiment found."""
    if unscored := [row for row in scored.select(["status", "detail"]).to_pylist() if row["status"] != SCORED]:
        raise InputError(f"{len(unscored)} variants have no score, the first: {unscored[0]['detail']}")
    joined = scored.append_column("consequence", pa.array([row.consequence for row in rows]))
    joined = joined.append_column("function_class", pa.array([row.function_class for row in rows]))
    with storage.open_output(path) as stream:
        pq.write_table(joined.replace_schema_metadata(None), stream)


def _measured(
    rows: Sequence[EditedVariant], delta: NDArray[np.float64], *, resamples: int, seed: int
) -> dict[str, Discrimination]:
    """Measure the model, the baseline, and the model within each class of consequence that has enough of both kinds."""
    positive = np.array([row.is_loss_of_function for row in rows])
    consequences = np.array([row.consequence for row in rows])
    results = {
        MODEL: discrimination(positive, -delta, resamples=resamples, seed=seed),
        BASELINE: discrimination(positive, consequence_scores(consequences.tolist()), resamples=resamples, seed=seed),
    }
    for name in dict.fromkeys(consequences.tolist()):
        inside = consequences == name
        if min(positive[inside].sum(), (~positive[inside]).sum()) >= _LEAST_IN_SUBSET:
            results[f"{MODEL}, {name}"] = discrimination(
                positive[inside], -delta[inside], resamples=resamples, seed=seed
            )
    return results


def _draw(
    folder: Path,
    rows: Sequence[EditedVariant],
    delta: NDArray[np.float64],
    results: dict[str, Discrimination],
    *,
    subtitle: str,
) -> None:
    classes = np.array([row.function_class for row in rows])
    groups = {_CLASS_NAMES[name]: delta[classes == name] for name in FUNCTION_CLASSES[::-1]}
    title = f"BRCA1, {len(rows):,} variants (Findlay et al. 2018)\n{subtitle}"
    label, positive = "log-likelihood of the variant minus that of the reference (nats)", _CLASS_NAMES["LOF"]
    plot_strip(groups, folder / "brca1_strip.png", title=title, label=label)
    plot_roc(results, folder / "brca1_roc.png", title=title, positive=positive)
    plot_pr(results, folder / "brca1_pr.png", title=title, positive=positive)


def _how(scoring: VariantsConfig) -> str:
    """Return the model and how its scores came about, for people."""
    window = checked_window(model_shell(scoring), scoring.window)
    strands = "both strands" if scoring.reverse_complement else "one strand"
    return f"{storage.name_of(scoring.model)}, window of {window:,} nt, {strands}"


def _numbers(result: Discrimination) -> dict[str, Any]:
    return {
        "auroc": asdict(result.auroc),
        "auprc": asdict(result.auprc),
        "num_positives": result.num_positives,
        "num_negatives": result.num_negatives,
    }
