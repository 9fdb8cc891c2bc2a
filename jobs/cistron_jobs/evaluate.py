"""``cistron evaluate benchmark=NAME model=DIR data=...``: a model beside honest baselines.

perplexity: the loss on a held-out split. brca1: loss of function from the scores of variants, see
:mod:`cistron_jobs.brca1`.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Final, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator

from cistron.config import Config
from cistron.evaluation.perplexity import (
    PROTOCOL_TEXTS,
    MaskProtocol,
    baseline_losses,
    open_plan,
    read_samples,
    score_samples,
)
from cistron.io import storage
from cistron.models.registry import Precision, load_model
from cistron_jobs import brca1
from cistron_jobs.variants import VariantsConfig

_FIELDS_OF: Final = {
    "perplexity": frozenset({"split", "protocol", "max_length", "max_samples", "baseline_samples", "order"}),
    "brca1": frozenset({"fasta", "window", "reverse_complement", "resamples", "run_dir", "actors"}),
}
"""Settings that only one benchmark has."""


class EvaluateConfig(Config):
    """What to measure."""

    benchmark: Literal["perplexity", "brca1"] = "perplexity"
    """perplexity: loss per scored token on a held-out split. brca1: how well scores of DNA variants find loss of
    function in the saturation genome editing of BRCA1 (Findlay 2018)."""
    model: str
    """Native checkpoint: a folder or URL, or a registry name whose weights are on disk."""
    data: str
    """perplexity: corpus folder that `cistron prepare_data` wrote. brca1: supplementary table 1 of Findlay 2018, the
    publisher's .xlsx or a CSV of it."""
    fasta: str | None = None
    """brca1: GRCh37, or its chromosome 17, or a region of that named as `samtools faidx` does."""
    output: str | None = None
    """JSON file for the result."""
    split: str = "valid"
    """Split to score; baselines are fitted on `train`."""
    protocol: MaskProtocol | None = None
    """perplexity of ESM-2; published unless given. published: all selected residues count, also those left visible or
    replaced, by any of the 33 tokens; compare that with published perplexities. hidden: only residues behind <mask> do,
    as in the held-out losses of a training run."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest document, nt or residues; the model's training length if not given."""
    max_samples: int | None = Field(default=None, gt=0)
    """Most documents to score; the whole split if not given."""
    baseline_samples: int | None = Field(default=10_000, gt=0)
    """Most training documents that baselines are fitted on, which takes a minute or two if they are of 16,384 nt; null
    takes the whole split."""
    order: int = Field(default=5, ge=0, le=12)
    """Bases of context of the Markov baseline for DNA."""
    window: int | None = Field(default=None, ge=2)
    """brca1: nucleotides of context; 8192, or the model's limit if that is lower, if not given."""
    reverse_complement: bool = False
    """brca1: average both strands; published numbers have one."""
    resamples: int = Field(default=2000, ge=100)
    """brca1: of the bootstrap that gives the intervals."""
    run_dir: str | None = None
    """brca1: folder of the run, runs/brca1-<time> if not given; the same folder goes on where a run was cut short."""
    actors: NonNegativeInt | None = None
    """brca1: as in `cistron variants`."""
    token_budget: int = Field(default=16_384, gt=0)
    """Most tokens in one forward pass."""
    seed: int = Field(default=42, ge=0)
    """Of crops, masks and bootstrap; published perplexities have 42."""
    device: str | None = None
    """Where to run; a GPU if there is one."""
    precision: Precision = "auto"
    """auto takes the path that is known to be good for the model on this device, or refuses; others run as named."""

    @model_validator(mode="after")
    def _check_benchmark(self) -> Self:
        for benchmark, fields in _FIELDS_OF.items():
            if benchmark != self.benchmark and (given := sorted(fields & self.model_fields_set)):
                raise ValueError(f"{given[0]} applies to benchmark={benchmark}, and this is {self.benchmark}")
        if self.benchmark == "brca1" and self.fasta is None:
            raise ValueError("fasta: benchmark=brca1 needs the reference that the variants refer to")
        return self


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print a table, and return what was written to `output`."""
    result, text = _perplexity(config) if config.benchmark == "perplexity" else _brca1(config)
    sys.stdout.write(text)
    if config.output is not None:
        storage.write_text(config.output, json.dumps(result, indent=2) + "\n")
    return result


def _brca1(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    assert config.fasta is not None, "checked with the settings"
    result = brca1.evaluate(
        VariantsConfig(
            model=config.model,
            device=config.device or "auto",
            precision=config.precision,
            actors=config.actors,
            input="variants.csv",
            output="variants.parquet",
            reference=config.fasta,
            window=config.window,
            reverse_complement=config.reverse_complement,
            on_mismatch="error",
            token_budget=config.token_budget,
        ),
        table=config.data,
        run_dir=config.run_dir,
        resamples=config.resamples,
        seed=config.seed,
    )
    return result, brca1.summary_text(result)


def _perplexity(config: EvaluateConfig) -> tuple[dict[str, Any], str]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config.model, device=device, precision=config.precision)
    length: int = config.max_length or model.config.max_length  # type: ignore[attr-defined]  # both families have it
    # Of a DNA model every base counts, which "hidden" means too: there is nothing that masks leave visible.
    protocol = config.protocol or ("published" if model.objective == "masked" else "hidden")
    plans = {
        split: open_plan(
            config.data,
            split,
            objective=model.objective,
            max_length=length,
            seed=config.seed,
            protocol=protocol,
        )
        for split in (config.split, "train")
    }
    samples = read_samples(plans[config.split], config.max_samples, protocol=protocol)
    scored = score_samples(model, samples, token_budget=config.token_budget)
    baselines = baseline_losses(plans["train"], samples, max_samples=config.baseline_samples, order=config.order)
    losses = {"model": scored.loss, **baselines}
    result = {
        "benchmark": config.benchmark,
        "settings": config.model_dump(mode="json"),
        "protocol": protocol if model.objective == "masked" else None,
        "num_samples": scored.num_samples,
        "num_tokens": scored.num_tokens,
        "loss": losses,
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
    }
    return result, table(result)


def table(result: dict[str, Any]) -> str:
    """Return the losses as text, best first."""
    head = f"{result['num_tokens']:,} scored tokens of {result['num_samples']:,} documents"
    if protocol := result["protocol"]:
        head += f", protocol {protocol}: {PROTOCOL_TEXTS[protocol]}; seed {result['settings']['seed']}"
    rows = sorted(result["loss"].items(), key=lambda row: row[1])
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {loss:7.4f} nats  perplexity {math.exp(loss):7.3f}" for name, loss in rows]
    return "\n".join([head, *lines, ""])
