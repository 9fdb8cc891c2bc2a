from __future__ import annotations

import math

import pytest
import torch
from tests.cistron.train.settings import tiny_run

from cistron.config import resolve
from cistron.errors import ConfigError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2
from cistron.train.config import OptimizerConfig, PretrainConfig
from cistron.train.optim import build_optimizer, learning_rate


def test_a_batch_that_workers_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"global_batch_size=8 must be a multiple of .* = 2 x 3 = 6"):
        tiny_run("corpus", "run", num_workers=3)
    assert tiny_run("corpus", "run", num_workers=2).train.blocks_per_worker == 2


def test_esm2_schedule_is_the_published_one():
    """Warm-up over w steps, then linearly to a tenth of the peak at 0.9 T, then constant (spec of Lin et al.)."""
    w, total, peak = 20, 1000, 4e-4
    train = tiny_run(
        "corpus",
        "run",
        steps=total,
        optimizer={"learning_rate": peak},
        schedule={"kind": "linear", "warmup_steps": w, "decay_steps": 900, "min_ratio": 0.1},
    ).train
    for s in (1, 7, 20, 21, 300, 899, 900, 950, 1000):
        if s < w:
            factor = s / w
        elif s <= 0.9 * total:
            factor = 1 - 0.9 * (s - w) / (0.9 * total - w)
        else:
            factor = 0.1
        assert learning_rate(train, s) == pytest.approx(peak * factor)


def test_esm2_kind_is_the_published_schedule_by_hand():
    """Peak 1, 4 steps of warm-up, 40 steps: down by 0.9 over the 32 steps up to step 36, then 0.1."""
    train = tiny_run(
        "corpus",
        "run",
        steps=40,
        optimizer={"learning_rate": 1.0},
        schedule={"kind": "esm2", "warmup_steps": 4},
    ).train
    by_hand = {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 12: 0.775, 20: 0.55, 28: 0.325, 36: 0.1, 37: 0.1, 40: 0.1}
    for step, rate in by_hand.items():
        assert learning_rate(train, step) == pytest.approx(rate), step
    odd = tiny_run(
        "corpus",
        "run",
        steps=15,
        optimizer={"learning_rate": 1.0},
        schedule={"kind": "esm2", "warmup_steps": 0},
    ).train
    # Nine tenths of 15 steps are 13.5: the decay ends between two steps.
    assert learning_rate(odd, 13) == pytest.approx(1 - 0.9 * 13 / 13.5)
    assert learning_rate(odd, 14) == 0.1


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({"kind": "esm2", "decay_steps": 5}, "decay_steps: .*nine tenths"),
        ({"kind": "esm2", "warmup_steps": 6}, "warmup_steps=6 is more than nine tenths of steps=6"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule, match):
    with pytest.raises(ConfigError, match=match):
        tiny_run("corpus", "run", schedule=schedule)


def test_what_an_esm2_run_does_not_say_is_as_published():
    def run(model, **train):
        settings = {"steps": 5000, "global_batch_size": 8, "token_budget": 64, **train}
        return resolve(PretrainConfig, {"model": model, "data": {"path": "x", "max_length": 32}, "train": settings})

    for model in ("esm2_8m", "esm2_t6_8M_UR50D", {"model_type": "esm", "hidden_size": 8}):
        train = run(model, optimizer={"learning_rate": 1e-3}).train
        assert (train.optimizer.learning_rate, train.optimizer.betas, train.optimizer.weight_decay) == (
            1e-3,
            (0.9, 0.98),
            0.01,
        )
        assert (train.schedule.kind, train.schedule.warmup_steps) == ("esm2", 2000)
    assert run("esm2_15b").train.optimizer.learning_rate == 1.6e-4
    assert run("evo2_7b").train.optimizer == OptimizerConfig()
    with pytest.raises(ConfigError, match=r"train: schedule\.warmup_steps=2000 is more than nine tenths of steps=100"):
        run("esm2_8m", steps=100)


def test_cosine_schedule_ends_at_the_floor():
    train = tiny_run(
        "corpus", "run", steps=110, optimizer={"learning_rate": 2.0}, schedule={"warmup_steps": 10, "min_ratio": 0.25}
    ).train
    assert learning_rate(train, 10) == 2.0
    assert learning_rate(train, 60) == pytest.approx(2 * (0.25 + 0.75 / 2))
    assert learning_rate(train, 35) == pytest.approx(2 * (0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate(train, 110) == pytest.approx(0.5)


def test_constant_schedule_stays():
    train = tiny_run("corpus", "run", schedule={"kind": "constant", "warmup_steps": 2}).train
    assert [learning_rate(train, s) / train.optimizer.learning_rate for s in (1, 2, 3, 6)] == [0.5, 1, 1, 1]


def test_weight_decay_spares_norms_and_biases():
    shape = Esm2Config(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16)
    model = Esm2(shape, device=torch.device("cpu"))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim == 2 else 0.0), name
