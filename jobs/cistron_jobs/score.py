"""Score the sequences of a FASTA file: log-likelihoods under Evo 2, pseudo-log-likelihoods under ESM-2."""

from __future__ import annotations

import pyarrow as pa

from cistron.inference.score import Reduction, score_sequences
from cistron.io.fasta import FastaRecord
from cistron.models.base import SequenceModel
from cistron_jobs.inference_job import RecordJobConfig, open_record_job, write_parquet


class ScoreConfig(RecordJobConfig):
    """Settings of ``cistron score``."""

    reduction: Reduction = "mean"
    """mean or sum over tokens; none gives the sum and a list with every token's log-probability."""
    reverse_complement: bool = False
    """DNA: average the scores of both strands."""
    prepend_bos: bool = False
    """DNA: begin with id 0, so that the first nucleotide is scored too."""
    vortex_compat: bool = False
    """DNA: log-probabilities in bf16, as the published losses have them."""


def run(config: ScoreConfig) -> str:
    """Score every record into columns name, score, num_tokens and, with reduction none, per_token; return the output.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    model, batches = open_record_job(config)
    write_parquet(config.output, (_scored(model, batch, config) for batch in batches))
    return config.output


def _scored(model: SequenceModel, records: list[FastaRecord], config: ScoreConfig) -> pa.Table:
    scores = score_sequences(
        model,
        [record.sequence for record in records],
        reduction=config.reduction,
        reverse_complement=config.reverse_complement,
        prepend_bos=config.prepend_bos,
        vortex_compat=config.vortex_compat,
        token_budget=config.token_budget,
    )
    columns = {
        "name": pa.array([record.name for record in records], pa.string()),
        "score": pa.array([score.score for score in scores], pa.float64()),
        "num_tokens": pa.array([score.num_tokens for score in scores], pa.int64()),
    }
    if config.reduction == "none":
        columns["per_token"] = pa.array([score.per_token for score in scores], pa.list_(pa.float32()))
    return pa.table(columns)
