"""`cluster.yaml` against the schema that Ray's own launcher uses, offline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())


def launch(config: dict[str, Any]) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_launcher_accepts_the_file():
    node_types = launch(CLUSTER)["available_node_types"]
    assert set(node_types) == {"head", "data", "train", "serve"}
    assert node_types["head"]["resources"] == {"CPU": 0}
    markets = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, kind in node_types.items()
    }
    assert markets == {"head": None, "data": None, "train": "spot", "serve": None}


@pytest.mark.parametrize("path", [("max_worker",), ("available_node_types", "train", "min_worker")])
def test_a_typo_is_refused(path: tuple[str, ...]):
    """The test above can fail: the schema does look at each level."""
    config = copy.deepcopy(CLUSTER)
    node = config
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = 3
    with pytest.raises(Exception, match=path[-1]):
        launch(config)


def test_the_image_has_the_ray_that_was_tested():
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    version = next(line.partition("==")[2] for line in constraints if line.startswith("ray=="))
    assert f":{version}-" in CLUSTER["docker"]["image"]
