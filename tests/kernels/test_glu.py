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
