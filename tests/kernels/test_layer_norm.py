import pytest
import torch

from cistron_kernels.layer_norm import layer_norm


def plain(x, weight, bias, eps):
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 33)])
def test_equals_definition(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(len(shape))
    x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    got = layer_norm(x, weight, bias, eps=1e-5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), plain(x, weight, bias, 1e-5), atol=tolerance, rtol=0)


def test_eps_stands_under_the_root():
    x = torch.tensor([[-1e-3, 1e-3]])
    got = layer_norm(x, torch.ones(2), torch.zeros(2), eps=1e-5)
    torch.testing.assert_close(got, x / (1e-6 + 1e-5) ** 0.5)


def test_gradients():
    generator = torch.Generator().manual_seed(9)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in [(4, 6), (6,), (6,)]]
    got = torch.autograd.grad(layer_norm(*inputs, eps=1e-5).square().sum(), inputs)
    want = torch.autograd.grad(plain(*inputs, 1e-5).square().sum(), inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
