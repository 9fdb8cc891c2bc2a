"""Exactness in fp32 with random weights: every path against the plain forward pass, for every kind of layer."""

from __future__ import annotations

from typing import Any

import torch

from cistron.evaluation.exactness import BATCH_LIMIT, STATE_LIMIT, exactness_battery
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2

WIDTH = 256
PATTERNS = ("SDH*SDH*", "S", "D", "H", "*")
LENGTH = 1_100


def run() -> list[dict[str, Any]]:
    """Return one row per model and check, with the largest difference of logits; one that is too large is an error."""
    torch.set_num_threads(2)
    rows = [row for pattern in PATTERNS for row in _checked(pattern)]
    if missed := [f"{row['layers']}: {row['check']}" for row in rows if not row["met"]]:
        raise AssertionError(f"not exact: {'; '.join(missed)}")
    return rows


def _checked(pattern: str) -> list[dict[str, Any]]:
    """Check a model with the published initialisation, whose largest logits are about 3."""
    config = Evo2Config(
        hidden_size=WIDTH,
        layer_pattern=pattern,
        num_attention_heads=WIDTH // 64,
        mlp_size=WIDTH * 11 // 4,
        num_filter_groups=WIDTH // 16,
        max_length=8_192,
    )
    model = Evo2(config, dtype=torch.float32).eval()
    assert (STATE_LIMIT, BATCH_LIMIT) == (1e-4, 1e-5), "the limits are the asked ones"
    return [
        {
            "layers": pattern,
            "check": check.name,
            "measured": float(f"{check.absolute:.1e}"),
            "asked": check.limit,
            "met": check.absolute <= check.limit,
        }
        for check in exactness_battery(model, length=LENGTH)
    ]
