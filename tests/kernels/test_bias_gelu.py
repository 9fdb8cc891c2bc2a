import math

import torch

from cistron_kernels.bias_gelu import bias_gelu


def test_equals_the_error_function_form():
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 7, generator=generator) * 3, torch.randn(7, generator=generator)
    u = (x + bias).double()
    want = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in u.tolist()]
    torch.testing.assert_close(bias_gelu(x, bias), torch.tensor(want), atol=1e-6, rtol=1e-6)


def test_differs_from_the_tanh_form():
    u = torch.linspace(-4, 4, 101)
    tanh = torch.nn.functional.gelu(u, approximate="tanh")
    assert (bias_gelu(u, torch.zeros(101)) - tanh).abs().max() > 1e-4


def test_bf16_is_rounded_once():
    x, bias = torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([0.01, 0.001])
    got = bias_gelu(x, bias)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, bias_gelu(x.float(), bias).bfloat16())


def test_gradients():
    x, bias = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    grad_x, grad_bias = torch.autograd.grad(bias_gelu(x, bias).sum(), [x, bias])
    u = (x + bias).detach()
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    want = 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * density
    torch.testing.assert_close(grad_x, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_bias, want.sum(0), atol=1e-5, rtol=1e-5)
