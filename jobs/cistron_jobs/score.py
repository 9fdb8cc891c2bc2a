"""Score the sequences of a FASTA file: log-likelihoods under Evo 2, pseudo-log-likelihoods under ESM-2."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
from pydantic import PositiveInt, model_validator

from cistron.alphabets import MASK, TAG_DELIMITER
from cistron.errors import SequenceError
from cistron.inference.protein_windows import check_window
from cistron.inference.score import Reduction, score_sequences
from cistron.models.base import SequenceModel
from cistron_jobs.inference_job import RecordJobConfig, run_record_job
from cistron_jobs.model_config import model_shell


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
    window: PositiveInt | None = None
    """Proteins: residues around a masked one that the model sees; as many as it saw in training (1022) unless given."""

    @model_validator(mode="after")
    def _check_strands(self) -> ScoreConfig:
        if self.reverse_complement and self.reduction == "none":
            raise ValueError("reduction none has a score per token, and reverse_complement averages whole strands")
        return self


def run(config: ScoreConfig) -> str:
    """Score every record into columns record, name, score and num_tokens; return the output.

    A column pseudo_perplexity follows for proteins, exp(-score per residue), and per_token with reduction none.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    check_window(model_shell(config), config.window)
    check = partial(_check, reverse_complement=config.reverse_complement)
    run_record_job("score", config, partial(_scored, config=config), check)
    return config.output


def _check(sequence: str, place: str, *, reverse_complement: bool) -> None:
    """Refuse at the door what scoring refuses later, when it knows no line of a file."""
    if MASK in sequence:
        raise SequenceError(f"{place}: {MASK} at letter {sequence.index(MASK) + 1} has no residue to score")
    if reverse_complement and TAG_DELIMITER in sequence:
        raise SequenceError(f"{place}: a phylogenetic tag ({TAG_DELIMITER}) has no reverse complement")


def _scored(model: SequenceModel, records: pa.Table, *, config: ScoreConfig) -> pa.Table:
    scores = score_sequences(
        model,
        records["sequence"].to_pylist(),
        reduction=config.reduction,
        reverse_complement=config.reverse_complement,
        prepend_bos=config.prepend_bos,
        vortex_compat=config.vortex_compat,
        window=config.window,
        token_budget=config.token_budget,
    )
    columns = {
        "name": records["name"],
        "score": pa.array([score.score for score in scores], pa.float64()),
        "num_tokens": pa.array([score.num_tokens for score in scores], pa.int64()),
    }
    if model.family == "esm2":
        per_residue = np.array([score.score for score in scores])
        if config.reduction != "mean":
            per_residue /= [score.num_tokens for score in scores]
        columns["pseudo_perplexity"] = pa.array(np.exp(-per_residue))
    if config.reduction == "none":
        columns["per_token"] = pa.array([score.per_token for score in scores], pa.list_(pa.float32()))
    return pa.table(columns)
