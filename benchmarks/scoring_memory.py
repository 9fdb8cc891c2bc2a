"""Peak memory of scoring one long sequence, above the weights: constant without attention, else growing by its KV.

It is measured in new processes whose C library returns what is freed, and once more as users have it.
"""

from __future__ import annotations

import random
import time
from typing import Any, Final

import numpy as np
import torch

from benchmarks.memory import peak, resident
from benchmarks.timing import RETURN_FREED_MEMORY, in_new_process
from cistron.inference.batching import TOKEN_BUDGET
from cistron.inference.score import score_sequences
from cistron.models.base import SequenceModel
from cistron.models.registry import build_model

HIDDEN: Final = 128
ATTENTION_FREE: Final = "SDHSDH"
WITH_ATTENTION: Final = "SDH*SD"
CASES: Final = (
    (ATTENTION_FREE, 100_000),
    (ATTENTION_FREE, 300_000),
    (ATTENTION_FREE, 1_000_000),
    (WITH_ATTENTION, 50_000),
    (WITH_ATTENTION, 100_000),
)
MOST_MIB: Final = 1024
SLACK_MIB: Final = 32
"""The request itself: letters, ids and log-probabilities, 20 bytes per nucleotide. An activation is 512 at 1M nt."""
ATTENTION_CHUNK: Final = 1_024
"""Tokens of a piece with attention: of more, the activations would hide the keys and values."""
ATTENTION_SLACK_MIB: Final = 16
TOLERANCE: Final = 1e-4
_MIB: Final = 2**20


def run() -> list[dict[str, Any]]:
    """Return one row per case; memory above what was asked for, or a wrong score, is an error."""
    rows = [_row(pattern, length) for pattern, length in CASES]
    alone = [row for row in rows if row["pattern"] == ATTENTION_FREE]
    free = [row["growth_mib"] for row in alone]
    most = max(max(row["growth_mib"], row["growth_mib_by_default"]) for row in alone)
    if most > MOST_MIB or max(free) - min(free) > SLACK_MIB:
        raise AssertionError(
            f"without attention, growth must stay under {MOST_MIB} MiB and not depend on length: {rows}"
        )
    short, long = (row for row in rows if row["pattern"] == WITH_ATTENTION)
    if abs((long["growth_mib"] - short["growth_mib"]) - (long["kv_mib"] - short["kv_mib"])) > ATTENTION_SLACK_MIB:
        raise AssertionError(f"with attention, only keys and values may grow: {rows}")
    return rows


def measure(pattern: str, length: int) -> dict[str, Any]:
    """Score one random sequence of `length` nt in this process and return what it took."""
    torch.set_num_threads(2)
    model = _model(pattern)
    _check_chunks(model)
    sequence = "".join(random.Random(0).choices("ACGT", k=length))
    before = resident()
    start = time.perf_counter()
    score_sequences(model, [sequence], token_budget=ATTENTION_CHUNK if "*" in pattern else TOKEN_BUDGET)
    seconds = time.perf_counter() - start
    growth = peak() - before
    return {
        "pattern": pattern,
        "length": length,
        "growth_mib": round(growth / _MIB, 1),
        "kv_mib": round(pattern.count("*") * length * 2 * HIDDEN * 4 / _MIB, 1),
        "asked": f"< {MOST_MIB} MiB, constant" if "*" not in pattern else "grows by kv_mib only",
        "seconds": round(seconds, 1),
        "nt_per_s": round(length / seconds),
    }


def _row(pattern: str, length: int) -> dict[str, Any]:
    returned, default = (
        in_new_process(measure, pattern, length, environment=variables) for variables in (RETURN_FREED_MEMORY, {})
    )
    row = {"growth_mib": returned["growth_mib"], "growth_mib_by_default": default["growth_mib"]}
    return {"pattern": pattern, "length": length, **row, **{name: default[name] for name in default if name not in row}}


def _model(pattern: str) -> SequenceModel:
    config = {
        "model_type": "evo2",
        "hidden_size": HIDDEN,
        "layer_pattern": pattern,
        "num_attention_heads": 2,
        "mlp_size": 2 * HIDDEN,
        "num_filter_groups": 32,
        "max_length": 1_048_576,
    }
    model = build_model(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # A fresh model finds all letters alike, which would hide a wrong one.
        for parameter in model.parameters():
            if parameter.dim() == 2 and min(parameter.shape) >= HIDDEN:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _check_chunks(model: SequenceModel) -> None:
    """Compare a score by chunks with one forward pass; small, so that it does not set the peak."""
    sequence = "".join(random.Random(1).choices("ACGT", k=1500))
    whole, by_chunks = (
        score_sequences(model, [sequence], reduction="none", token_budget=budget)[0].per_token
        for budget in (len(sequence), 400)
    )
    difference = np.abs(whole - by_chunks).max()
    if difference > TOLERANCE:
        raise AssertionError(f"by chunks a token's log-probability differs by {difference:.1e}")
