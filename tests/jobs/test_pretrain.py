"""The shipped runs are complete and say in their name what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cistron.config import parse_yaml, resolve
from cistron.models.published import ALIASES
from cistron.models.registry import config_from, list_models
from cistron.train.config import PretrainConfig
from cistron.train.optim import learning_rate

CONFIGS = sorted(Path(__file__).parents[2].glob("jobs/configs/pretrain-*.yaml"))
NAME = re.compile(r"pretrain-(?P<model>\w+)-\w+-(?P<nodes>\d+)n(?P<gpus>\d+)g-(?P<strategy>\w+)")


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_what_its_name_says(path):
    config = resolve(PretrainConfig, parse_yaml(path.read_text(), source=path.name))
    name = NAME.fullmatch(path.stem)
    assert name, "model, data, nodes, GPUs per node, strategy"
    assert config.model in list_models()
    assert config.model.startswith(ALIASES.get(name["model"], name["model"]))
    train, gpus = config.train, int(name["nodes"]) * int(name["gpus"])
    assert train.use_gpu == (gpus > 0)
    assert train.num_workers == gpus or not gpus
    stage = getattr(train.strategy, "zero_stage", None)
    assert name["strategy"] == (f"zero{stage}" if stage else train.strategy.kind)
    shape = config_from(config.model)
    special = 2 if shape.model_type == "esm" else 0
    assert config.data.max_length + special <= train.token_budget
    assert config.data.max_length <= shape.max_length


@pytest.mark.parametrize(
    ("size", "peak", "decay", "steps", "tokens"),
    [
        ("8m", 4e-4, 0.01, 500_000, 2e6),
        ("650m", 4e-4, 0.01, 500_000, 2e6),
        ("3b", 4e-4, 0.01, 500_000, 2e6),
        ("15b", 1.6e-4, 0.1, 270_000, 3.2e6),
    ],
)
def test_esm2_configs_are_the_published_recipe(size, peak, decay, steps, tokens):
    (path,) = (path for path in CONFIGS if path.stem.startswith(f"pretrain-esm2_{size}-"))
    settings = parse_yaml(path.read_text(), source=path.name)
    config = resolve(PretrainConfig, settings)
    train = config.train
    assert (train.steps, train.optimizer.learning_rate, train.optimizer.weight_decay) == (steps, peak, decay)
    assert (train.optimizer.betas, train.optimizer.eps, train.schedule.warmup_steps) == ((0.9, 0.98), 1e-8, 2000)
    # UniRef90 cropped to 1,022 residues: 318.8 tokens on average.
    assert train.global_batch_size * 318.8 == pytest.approx(tokens, rel=0.03)
    assert learning_rate(train, round(0.9 * steps)) == pytest.approx(peak / 10)
    assert (config.data.max_length, config.data.crop, config.data.replacement) == (1022, "random", "standard")
    # The recipe is also what a run gets that names the model only.
    assert resolve(PretrainConfig, without(settings, "optimizer", "schedule")) == config


def without(settings, *sections):
    return settings | {"train": {key: value for key, value in settings["train"].items() if key not in sections}}
