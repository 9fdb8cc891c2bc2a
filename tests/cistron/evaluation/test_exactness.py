from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CapabilityError
from cistron.evaluation.exactness import BATCH_LIMIT, HALF_PRECISION_LIMIT, STATE_LIMIT, exactness_battery
from cistron.models.evo2 import hyena


def failed(model: torch.nn.Module, length: int = 60) -> set[str]:
    return {check.name for check in exactness_battery(model, length=length) if not check.passed}


NVIDIA = {"mlp_activation": "gelu", "hcs_bias": True, "norm_eps_inside": True}


@pytest.mark.parametrize("pattern", ["S", "D", "H", "*"])
def test_every_kind_of_layer_is_exact(pattern):
    assert not failed(tiny_evo2(layer_pattern=pattern), length=150)


@pytest.mark.parametrize("changes", [NVIDIA, {"parametrization": "training"}])
def test_variants_are_exact(changes):
    assert not failed(tiny_evo2(**changes))


def test_the_limits_depend_on_the_precision():
    limits = {check.name: check.limit for check in exactness_battery(tiny_evo2(), length=20)}
    assert limits["chunks of 7 = whole"] == STATE_LIMIT
    assert limits["fork of a shared prefix = independent"] == BATCH_LIMIT
    half = list(exactness_battery(tiny_evo2().bfloat16(), length=20))
    assert {check.limit for check in half} == {HALF_PRECISION_LIMIT}
    assert all(check.passed for check in half)


def test_a_proteins_neighbours_do_not_matter():
    assert not failed(tiny_esm2())


def test_a_lost_modal_state_shows(monkeypatch):
    exact = hyena.gated_modal_step

    def forgetful(*arguments):
        *_, state, _ = arguments
        state.mul_(0.9)
        return exact(*arguments)

    monkeypatch.setattr(hyena, "gated_modal_step", forgetful)
    assert failed(tiny_evo2()) == {"step by step = whole", "prompts of 1 to 8 tokens, then steps = whole"}


def test_a_row_that_sees_its_neighbour_shows(monkeypatch):
    exact = hyena.gated_fir_step

    def leaking(x, *arguments, **options):
        return exact(x + 1e-3 * (x.mean(dim=0) - x), *arguments, **options)

    monkeypatch.setattr(hyena, "gated_fir_step", leaking)
    assert "batch of mixed lengths = one at a time, logits" in failed(tiny_evo2())


def test_not_a_number_is_named():
    model = tiny_evo2()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(CapabilityError, match="not finite"):
        failed(model)
