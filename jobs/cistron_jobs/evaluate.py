"""``cistron evaluate benchmark=perplexity model=DIR data=CORPUS``: a model beside honest baselines."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Literal

import torch
from pydantic import Field

from cistron.config import Config
from cistron.evaluation.perplexity import baseline_losses, open_plan, read_samples, score_samples
from cistron.io import storage
from cistron.models.registry import load_model


class EvaluateConfig(Config):
    """What to measure."""

    benchmark: Literal["perplexity"] = "perplexity"
    """perplexity: loss per scored token on a held-out split."""
    model: str
    """Native checkpoint: a folder or URL, or a registry name whose weights are on disk."""
    data: str
    """Corpus folder that `cistron prepare_data` wrote."""
    output: str | None = None
    """JSON file for the result."""
    split: str = "valid"
    """Split to score; baselines are fitted on `train`."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest document, nt or residues; the model's training length if not given."""
    max_samples: int | None = Field(default=None, gt=0)
    """Most documents to score; the whole split if not given."""
    baseline_samples: int | None = Field(default=None, gt=0)
    """Most training documents that baselines are fitted on; the whole split if not given."""
    order: int = Field(default=5, ge=0, le=12)
    """Bases of context of the Markov baseline for DNA."""
    token_budget: int = Field(default=16_384, gt=0)
    """Most tokens in one forward pass."""
    seed: int = Field(default=0, ge=0)
    """Of crops and masks."""
    device: str | None = None
    """Where to run; a GPU if there is one."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print a table, and return what was written to `output`."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config.model, device=device)
    length: int = config.max_length or model.config.max_length  # type: ignore[attr-defined]  # both families have it
    plans = {
        split: open_plan(config.data, split, objective=model.objective, max_length=length, seed=config.seed)
        for split in (config.split, "train")
    }
    samples = read_samples(plans[config.split], config.max_samples)
    scored = score_samples(model, samples, token_budget=config.token_budget)
    baselines = baseline_losses(plans["train"], samples, max_samples=config.baseline_samples, order=config.order)
    losses = {"model": scored.loss, **baselines}
    result = {
        "benchmark": config.benchmark,
        "settings": config.model_dump(mode="json"),
        "num_samples": scored.num_samples,
        "num_tokens": scored.num_tokens,
        "loss": losses,
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
    }
    sys.stdout.write(table(result))
    if config.output is not None:
        storage.write_text(config.output, json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Return the losses as text, best first."""
    head = f"{result['num_tokens']:,} scored tokens of {result['num_samples']:,} documents"
    rows = sorted(result["loss"].items(), key=lambda row: row[1])
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {loss:7.4f} nats  perplexity {math.exp(loss):7.3f}" for name, loss in rows]
    return "\n".join([head, *lines, ""])
