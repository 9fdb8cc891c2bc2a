"""The shipped runs are complete and say in their name what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cistron.config import parse_yaml, resolve
from cistron.models.registry import config_from, list_models
from cistron.train.config import PretrainConfig

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
    assert config.model.startswith(name["model"])
    train, gpus = config.train, int(name["nodes"]) * int(name["gpus"])
    assert train.use_gpu == (gpus > 0)
    assert train.num_workers == gpus or not gpus
    stage = getattr(train.strategy, "zero_stage", None)
    assert name["strategy"] == (f"zero{stage}" if stage else train.strategy.kind)
    shape = config_from(config.model)
    special = 2 if shape.model_type == "esm" else 0
    assert config.data.max_length + special <= train.token_budget
    assert config.data.max_length <= shape.max_length
