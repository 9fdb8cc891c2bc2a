"""What a replica says of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import tiny_esm2

from cistron.models.checkpoint import save_checkpoint
from cistron.models.layers.linear import Linear
from cistron.models.registry import load_model
from cistron_serve.deployments import ModelServer, ModelSettings, describe


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_the_card_names_the_arithmetic_and_counts_all_parameters(tmp_path: Path, precision: Any) -> None:
    exact = tiny_esm2()
    save_checkpoint(exact, tmp_path / "m")
    model = load_model(tmp_path / "m", device="cpu", precision=precision)
    card = describe("m", model, ModelSettings(source=str(tmp_path / "m"), precision=precision))
    assert card.num_parameters == exact.num_parameters()
    assert card.dtype == ("int8" if precision == "int8" else "float32")
    assert card.dtype in card.fingerprint


def test_a_replica_reorders_its_weights_once(tmp_path: Path) -> None:
    save_checkpoint(tiny_esm2(), tmp_path / "m")
    server = ModelServer("m", ModelSettings(source=str(tmp_path / "m"), device="cpu"))
    layers = [module for module in server._model.modules() if isinstance(module, Linear)]
    assert layers
    assert all(layer.reordered is not None for layer in layers)
