from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.tiny_models import tiny_evo2
from torch import nn

from cistron.models.layers import linear, onednn
from cistron.models.layers.fp8 import set_fp8_path
from cistron.models.layers.linear import GeluLinear, Linear, reorder_weights, reordered_weights
from cistron.testing import assert_close


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "_LEAST_REORDERED", 0)


def reordered(model: nn.Module) -> int:
    return sum(isinstance(module, Linear) and module.reordered is not None for module in model.modules())


@pytest.mark.parametrize("rows", [1, 2, 8, 100])
@torch.inference_mode()
def test_results_are_those_of_the_plain_layers(rows: int):
    torch.manual_seed(0)
    model = nn.Sequential(Linear(48, 70), Doubled(70, 33, bias=False), GeluLinear(33, 5)).eval()
    x = torch.randn(rows, 1, 48)
    expected = model.double()(x.double()).float()
    model.float()
    with reordered_weights(model):
        assert reordered(model) == 2, "a layer with a forward pass of its own keeps it"
        assert_close(model(x), expected, relative=1e-6)
    assert reordered(model) == 0


@torch.inference_mode()
def test_a_model_is_as_before_afterwards_whatever_happened():
    model, ids = tiny_evo2(), torch.tensor([list(b"ACGTTGCA")])
    before, keys = model(ids).logits, list(model.state_dict())
    with reordered_weights(model):
        assert_close(model(ids).logits, before, relative=1e-5)
        assert list(model.state_dict()) == keys
        with reordered_weights(model):
            pass
        assert reordered(model), "an inner block leaves the outer one's layers alone"
    with pytest.raises(KeyError), reordered_weights(model):
        raise KeyError
    assert reordered(model) == 0
    assert torch.equal(model(ids).logits, before)


@torch.inference_mode()
def test_a_program_that_only_infers_keeps_the_copies():
    model, ids = tiny_evo2(), torch.tensor([list(b"ACGTTGCA")])
    before = model(ids).logits
    assert len(reorder_weights(model)) == reordered(model) > 0
    assert reorder_weights(model) == [], "a second copy of a layer would be a waste"
    with reordered_weights(model):
        pass
    assert reordered(model), "a block leaves the copies that it did not make"
    assert_close(model(ids).logits, before, relative=1e-5)


@torch.inference_mode()
def test_a_copied_or_pickled_model_has_plain_layers():
    model, ids = tiny_evo2(), torch.tensor([list(b"ACGTTGCA")])
    before = model(ids).logits
    reorder_weights(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # what was just written
        assert reordered(twin) == 0
        assert torch.equal(twin(ids).logits, before)
    assert reordered(model)


def test_other_precisions_and_large_models_keep_their_layers(monkeypatch: pytest.MonkeyPatch):
    half, emulated, large = tiny_evo2().bfloat16(), tiny_evo2(layer_pattern="S"), tiny_evo2()
    set_fp8_path(emulated, "emulated")
    with reordered_weights(half), reordered_weights(emulated):
        assert reordered(half) == 0
        assert reordered(emulated) == 4, "the FP8 projection multiplies by another form of its weight"
    monkeypatch.setattr(linear, "MOST_BYTES", 1000)
    with reordered_weights(large):
        assert reordered(large) == 0
    assert reorder_weights(large, most_bytes=1000) == []
