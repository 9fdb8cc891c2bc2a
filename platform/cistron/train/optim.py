"""Optimisers and learning rates; both are plain functions of the configuration."""

from __future__ import annotations

import math

import torch

from cistron.models.base import SequenceModel
from cistron.train.config import ESM2_DECAY_SHARE, OptimizerConfig, TrainConfig


def build_optimizer(model: SequenceModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters, those that decay and those that do not in two groups."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if model.decays(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if not model.decays(name)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of optimiser step `step`, counted from 1.

    Warm-up rises linearly and reaches the peak at step ``warmup_steps``; the decay begins there and reaches
    ``min_ratio`` at ``decay_steps``, or with ``esm2`` at nine tenths of the run (Lin et al. 2023).
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    end = ESM2_DECAY_SHARE * config.steps if schedule.kind == "esm2" else schedule.decay_steps or config.steps
    done = min(1.0, (step - warmup) / (end - warmup)) if warmup < end else float(step > warmup)
    remaining = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * remaining)
