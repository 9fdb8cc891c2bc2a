"""A reference and its three alternatives in a centred window: the shared prefix against independent sequences.

Half the reference and half of each alternative is 5/8 of the tokens, but 13/16 of what attention has to look at, so the
share of the cost lies between the two. The model has Evo 2's share of attention layers; being narrow, it spends more of
its time in them than a released model at 8,192 nucleotides does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved
from cistron.inference.prefix import shared_prefix_sums, shared_segments
from cistron.inference.score import sequence_log_probs
from cistron.inference.variants import variant_windows
from cistron.inference.windows import Variant
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2

WINDOWS = (2_048, 4_096)
TOKENS = 16_384
"""Tokens of the independent computation, whatever the window: two places of the short one, one of the long one."""
MOST_OF_THE_COST = 0.68
TOLERANCE = 1e-5
"""Of a token's log-likelihood, averaged over the window: fp32 rounds the sum of thousands of them coarser than that."""


def run() -> list[dict[str, Any]]:
    """Return one row per window; a wrong result is an error, not a row."""
    torch.set_num_threads(2)
    model = _model()
    return [_compare(model, window) for window in WINDOWS]


def _compare(model: Evo2, window: int) -> dict[str, Any]:
    sequences = _sequences(window, loci=TOKENS // (4 * window))
    difference = np.abs(shared_prefix_sums(model, sequences) - _independent(model, sequences)).max() / window
    if difference > TOLERANCE:
        raise AssertionError(f"scores differ by {difference:.1e} a token at window {window}: no speed is reported")
    seconds = interleaved(
        {
            "shared": lambda: shared_prefix_sums(model, sequences),
            "independent": lambda: _independent(model, sequences),
        },
        rounds=3,
    )
    tokens = sum(segment.num_tokens for segment in shared_segments(sequences))
    return {
        "window": window,
        "shared_s": round(seconds["shared"], 2),
        "independent_s": round(seconds["independent"], 2),
        "share_of_the_cost": round(seconds["shared"] / seconds["independent"], 3),
        "asked_at_most": MOST_OF_THE_COST,
        "share_of_the_tokens": round(tokens / sum(map(len, sequences)), 3),
        "difference_per_token": float(f"{difference:.1e}"),
    }


@torch.inference_mode()
def _independent(model: Evo2, sequences: Sequence[str]) -> np.ndarray:
    """Score every sequence from its beginning, in batches of the same budget."""
    return np.array([values.sum(dtype=np.float64) for values in sequence_log_probs(model, sequences)])


def _sequences(window: int, *, loci: int) -> list[str]:
    """Return the reference and the three alternatives of random places, far enough apart to share nothing else."""
    contig = "".join(random.Random(0).choices("ACGT", k=window * loci))
    found: dict[str, None] = {}
    for locus in range(loci):
        pos = locus * window + window // 2 + 1
        ref = contig[pos - 1]
        for alt in "ACGT".replace(ref, ""):
            found.update(dict.fromkeys(variant_windows(Variant("c", pos, ref, alt), contig, window=window)))
    return list(found)


def _model() -> Evo2:
    config = Evo2Config(
        hidden_size=256,
        layer_pattern="SDH*SDH",
        num_attention_heads=2,
        mlp_size=688,
        num_filter_groups=64,
        max_length=max(WINDOWS),
    )
    model = Evo2(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # The published initialisation predicts almost the same for every token, which would hide an error.
            if parameter.dim() == 2 and min(parameter.shape) > config.hcm_filter_length:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return model
