from __future__ import annotations

import pytest
import torch

from cistron_kernels.rms_norm import rms_norm


def naive(x: torch.Tensor, weight: torch.Tensor, eps: float, inside: bool) -> torch.Tensor:
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        mean_square = sum(value * value for value in row) / len(row)
        divisor = (mean_square + eps) ** 0.5 if inside else mean_square**0.5 + eps
        rows.append(torch.stack([w * value / divisor for w, value in zip(weight, row, strict=True)]))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_the_definition_in_both_forms(inside: bool, eps: float):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, eps=eps, eps_inside=inside), naive(x, weight, eps, inside))


@pytest.mark.parametrize("inside", [False, True])
def test_gradients(inside: bool):
    torch.manual_seed(1)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps=1e-3, eps_inside=inside), (x, weight))


@pytest.mark.parametrize("inside", [False, True])
def test_a_row_of_zeros_has_finite_output_and_gradient(inside: bool):
    x = torch.zeros(1, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), eps=1e-6, eps_inside=inside)
    y.sum().backward()
    assert y.abs().sum() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bf16_is_rounded_once():
    torch.manual_seed(2)
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    exact = rms_norm(x.double(), weight.double(), eps=1e-6, eps_inside=False)
    got = rms_norm(x, weight, eps=1e-6, eps_inside=False)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_without_a_gradient_the_numbers_and_the_inputs_stay(inside: bool, dtype: torch.dtype):
    x, weight = torch.randn(3, 16).to(dtype), torch.rand(16)
    before = x.clone()
    want = rms_norm(x, weight, eps=1e-6, eps_inside=inside)
    with torch.no_grad():
        got = rms_norm(x, weight, eps=1e-6, eps_inside=inside)
    assert torch.equal(got, want)
    assert torch.equal(x, before)
