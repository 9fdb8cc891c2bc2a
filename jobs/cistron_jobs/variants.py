"""Score the variants of a VCF or a table: one row per alternative allele, and the VCF with the scores in it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveInt

from cistron import __version__
from cistron.errors import ConfigError, InputError
from cistron.inference.batching import TOKEN_BUDGET
from cistron.inference.variant_report import MAX_AMBIGUOUS, SCORED, report_variants
from cistron.inference.variants import checked_window
from cistron.inference.windows import Problem, Variant, find_window
from cistron.io import storage
from cistron.io.alleles import Allele, is_vcf, read_alleles
from cistron.io.reference import ReferenceGenome, open_reference
from cistron.io.vcf import NO_ALT
from cistron.io.vcf_annotation import InfoField, annotate_vcf, check_annotation
from cistron.models.base import SequenceModel
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.output import ParquetPath
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.model_config import model_shell

logger = logging.getLogger(__name__)

_INFO_FIELDS: Final = {
    "score": InfoField("EVO2_DELTA", "Float", "Log-likelihood of the window with ALT minus that with REF, nats"),
    "ref_score": InfoField("EVO2_REFLL", "Float", "Log-likelihood of the window with REF, nats"),
    "alt_score": InfoField("EVO2_ALTLL", "Float", "Log-likelihood of the window with ALT, nats"),
    "status": InfoField("EVO2_STATUS", "String", "scored, or why there is no score"),
}
"""What each column of the output becomes in INFO."""
_DISAGREEMENTS: Final = frozenset({"ref_mismatch", "outside_contig", "unknown_contig", "outside_reference"})
_LETTERS_PER_PART: Final = 1 << 21
_SUSPICIOUS: Final = 0.05
"""Share of alleles that disagree with the reference, above which it is rather another assembly than bad lines."""
_ALLELES: Final = pa.schema(
    [("record", pa.int64()), ("chrom", pa.string()), ("pos", pa.int64()), ("ref", pa.string()), ("alt", pa.string())]
)


class VariantsConfig(BulkConfig):
    """Settings of ``cistron variants``."""

    input: str
    """VCF or BCF, or a table (.tsv, .csv, .txt, each also .gz, or .parquet) with columns chrom, pos (1-based), ref and
    alt; a path or URL."""
    reference: str
    """FASTA of the assembly that the variants refer to; with an index (samtools faidx) it is read by region."""
    output: ParquetPath
    """Parquet file to write: one row per alternative allele, in the order of the input; `record` is the number of its
    input record from 0, `score` the change of the log-likelihood in nats (negative: the model finds the alternative
    less likely), `status` says scored or why not, `detail` the same in a sentence."""
    annotated_vcf: str | None = None
    """VCF file to write: the input with the scores in INFO; .vcf.gz and .vcf.bgz are bgzip, with a tabix index if the
    records are sorted."""
    window: int | None = Field(default=None, ge=2)
    """Nucleotides of context, centred on pos and cut at the contig's ends; 8192, or the model's limit if that is lower,
    if not given."""
    reverse_complement: bool = False
    """Average the scores of both strands, which takes twice the time; published ones are of the given strand."""
    on_mismatch: Literal["report", "error"] = "report"
    """A variant that disagrees with the reference (another reference allele, an unknown contig, a position beyond it):
    report gives it a status and no score, error stops before anything is computed."""
    max_ambiguous: float = Field(default=MAX_AMBIGUOUS, ge=0, le=1)
    """Share of the window that may be other than A, C, G and T; with more, a variant has a status and no score."""
    token_budget: PositiveInt = TOKEN_BUDGET
    """Most tokens of one forward pass, padding included."""
    letters_per_part: PositiveInt = _LETTERS_PER_PART
    """Most nucleotides of a part, counting a window per allele; the variants of one place stay together."""


def run(config: VariantsConfig) -> str:
    """Score every alternative allele; return the output.

    Raises:
        CistronError: an input that cannot be used; a setting that does not apply.
    """
    if config.annotated_vcf is not None:
        if not is_vcf(config.input):
            raise ConfigError(f"annotated_vcf: there is no VCF to annotate, the input is {config.input}")
        check_annotation(config.input, config.annotated_vcf)
    model = model_shell(config)
    if model.family != "evo2":
        hint = "see protein_variants"
        raise InputError(f"variants: DNA variants are scored with Evo 2, and this is {model.family}; {hint}")
    window = checked_window(model, config.window)
    job = BulkJob(
        name="variants",
        output=config.output,
        inputs=("input", "reference"),
        extra_outputs=("annotated_vcf",),
        parts=partial(variant_parts, config, window),
        compute=VariantScorer(config, window),
    )
    run_bulk(config, job)
    _log_statuses(config.output, config.reference)
    if config.annotated_vcf is not None:
        annotate_vcf(config.input, config.annotated_vcf, info_fields(config, window), _info_values(config.output))
        logger.info("variants: %s has the scores in INFO", config.annotated_vcf)
    return config.output


def info_fields(config: VariantsConfig, window: int) -> list[InfoField]:
    """Return the declarations of the INFO fields, with what their values depend on."""
    strands = "both strands" if config.reverse_complement else "one strand"
    source = f"{config.model}, window {window}, {strands}, reference {config.reference}"
    return [replace(field, source=source, version=f"cistron {__version__}") for field in _INFO_FIELDS.values()]


class VariantScorer:
    """From the alleles of a part to their rows; opens the reference once in each process."""

    def __init__(self, config: VariantsConfig, window: int) -> None:
        self._config, self._window = config, window
        self._genome: ReferenceGenome | None = None

    def __call__(self, model: SequenceModel, alleles: pa.Table) -> pa.Table:
        """Score a part."""
        self._genome = self._genome or open_reference(self._config.reference)
        report = report_variants(
            model,
            [Variant(*row) for row in zip(*(column.to_pylist() for column in alleles.columns[1:]), strict=True)],
            self._genome,
            window=self._window,
            reverse_complement=self._config.reverse_complement,
            max_ambiguous=self._config.max_ambiguous,
            token_budget=self._config.token_budget,
        )
        return report.add_column(0, _ALLELES.field("record"), alleles["record"])


def variant_parts(config: VariantsConfig, window: int) -> Iterator[pa.Table]:
    """Yield the alleles; those of one place stay together, because they share their windows.

    Raises:
        InputError: an input that cannot be read, or a variant that disagrees with the reference if that is to stop.
    """
    genome = open_reference(config.reference) if config.on_mismatch == "error" else None
    places = (list(alleles) for _, alleles in groupby(read_alleles(config.input), key=lambda a: (a.chrom, a.pos)))
    strands = 2 if config.reverse_complement else 1
    parts = cut(
        places,
        max_items=config.records_per_part,
        max_weight=config.letters_per_part,
        weight=lambda alleles: strands * window * (len(alleles) + 1),
    )
    for part in parts:
        alleles = [allele for place in part for allele in place]
        if genome is not None:
            _check(alleles, genome, window)
        yield pa.table(list(map(list, zip(*alleles, strict=True))), schema=_ALLELES)


def _check(alleles: Sequence[Allele], genome: ReferenceGenome, window: int) -> None:
    for record, chrom, pos, ref, alt in alleles:
        found = find_window(Variant(chrom, pos, ref, alt), genome, window=window)
        if isinstance(found, Problem) and found.status in _DISAGREEMENTS:
            raise InputError(f"record {record + 1}: {found.message} ({found.status}; on_mismatch=report goes on)")


def _log_statuses(output: str, reference: str) -> None:
    """Say how many alleles have a score, and why the others have none."""
    counts, examples = Counter[str](), dict[str, str]()
    for row in _rows(output, ["status", "detail"]):
        counts[row["status"]] += 1
        examples.setdefault(row["status"], row["detail"])
    total, scored = counts.total(), counts.pop(SCORED, 0)
    level = logging.INFO if scored else logging.WARNING
    logger.log(level, "variants: %s of %s alleles scored", f"{scored:,}", f"{total:,}")
    for status, number in counts.most_common():
        logger.log(level, "variants: %s %s, the first: %s", f"{number:,}", status, examples[status])
    disagreeing = sum(counts[status] for status in _DISAGREEMENTS)
    if disagreeing > _SUSPICIOUS * total:
        share = f"{disagreeing:,} of {total:,} alleles"
        logger.warning("variants: %s disagree with %s: is it the right assembly?", share, reference)


def _info_values(output: str) -> Iterator[list[object]]:
    """Yield the INFO values of every alternative allele, in the order of the file."""
    for _, rows in groupby(_rows(output, ["record", "alt", *_INFO_FIELDS]), key=itemgetter("record")):
        alleles = list(rows)
        if [row["alt"] for row in alleles] != [NO_ALT]:
            yield from ([row[name] for name in _INFO_FIELDS] for row in alleles)


def _rows(output: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, one row group in memory at a time."""
    with storage.open_input(output) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=columns).to_pylist()
