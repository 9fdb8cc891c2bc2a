from __future__ import annotations

import math

import pytest
import torch

from cistron_kernels.glu import Activation, glu


def test_gelu_is_the_exact_one():
    gate, value = torch.linspace(-4, 4, 33, dtype=torch.float64), torch.linspace(2, -1, 33, dtype=torch.float64)
    expected = [
        a * 0.5 * (1 + math.erf(a / math.sqrt(2))) * b for a, b in zip(gate.tolist(), value.tolist(), strict=True)
    ]
    torch.testing.assert_close(glu(gate, value, activation="gelu"), torch.tensor(expected, dtype=torch.float64))


def test_identity_is_bilinear():
    gate, value = torch.tensor([-3.0, 0.5]), torch.tensor([2.0, -4.0])
    assert glu(gate, value, activation="identity").tolist() == [-6.0, -2.0]


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_gradients(activation: Activation):
    torch.manual_seed(0)
    gate, value = (torch.randn(2, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: glu(a, b, activation=activation), (gate, value))


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_without_a_gradient_the_numbers_and_the_inputs_stay(activation: Activation):
    both = torch.randn(3, 14)
    before = both.clone()
    want = glu(both[:, :7], both[:, 7:], activation=activation)
    with torch.no_grad():
        got = glu(both[:, :7], both[:, 7:], activation=activation)
    assert torch.equal(got, want)
    assert torch.equal(both, before)
