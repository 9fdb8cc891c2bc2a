"""A run small enough to train in a second."""

from __future__ import annotations

from typing import Any

from cistron.config import merge, resolve
from cistron.train.config import PretrainConfig

EVO2 = {
    "model_type": "evo2",
    "hidden_size": 16,
    "layer_pattern": "SDH*",
    "num_attention_heads": 2,
    "mlp_size": 32,
    "num_filter_groups": 4,
    "hcm_filter_length": 16,
    "filter_cache_length": 64,
    "max_length": 64,
}


def tiny_run(corpus: object, run_dir: object, **train: Any) -> PretrainConfig:
    settings = {
        "model": EVO2,
        "data": {"path": str(corpus), "max_length": 32},
        "run_dir": str(run_dir),
        "train": {
            "steps": 6,
            "global_batch_size": 8,
            "samples_per_block": 2,
            "token_budget": 48,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.02},
            "schedule": {"warmup_steps": 2},
        },
    }
    return resolve(PretrainConfig, merge(settings, {"train": train}))
