import pytest
import torch
from torch.nn import functional

from cistron.models.layers import onednn
from cistron.models.layers.linear import GeluLinear, Linear

SHAPES = [(1, 8), (5, 3, 8), (700, 8), (0, 8)]


def layer_of(kind, seed=0):
    layer = kind(8, 12)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def plain(layer, x):
    y = x.double() @ layer.weight.double().T + layer.bias.double()
    return (y * 0.5 * (1 + torch.erf(y / 2**0.5)) if isinstance(layer, GeluLinear) else y).to(x.dtype)


@pytest.fixture
def onednn_calls(monkeypatch):
    """Count calls of the operator that only inference on CPUs takes, small products included."""
    monkeypatch.setattr(onednn, "_LEAST", 0)
    calls = []
    operator = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize("kind", [Linear, GeluLinear])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_equals_the_definition(kind, shape, onednn_calls):
    layer = layer_of(kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(layer, x), atol=3e-6, rtol=1e-5)
        strided = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)).T[::2]
        torch.testing.assert_close(layer(strided), plain(layer, strided), atol=3e-6, rtol=1e-5)
    assert len(onednn_calls) == 2


def test_products_too_small_to_gain_take_the_plain_way(onednn_calls, monkeypatch):
    monkeypatch.setattr(onednn, "_LEAST", 1000)
    layer = layer_of(Linear)
    with torch.inference_mode():
        layer(torch.zeros(10, 8))
        assert len(onednn_calls) == 0
        layer(torch.zeros(11, 8))
    assert len(onednn_calls) == 1


@pytest.mark.parametrize("kind", [Linear, GeluLinear])
def test_weights_are_read_at_every_call(kind):
    """Nothing that is derived from the weights is kept: training and loading change them in many ways."""
    layer = layer_of(kind)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.copy_(layer.weight * 2)
        assert not torch.allclose(layer(x), before)
        torch.testing.assert_close(layer(x), plain(layer, x), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [Linear, GeluLinear])
def test_gradients_and_other_dtypes_take_the_plain_way(kind, onednn_calls):
    layer = layer_of(kind)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    (want,) = torch.autograd.grad(plain(layer, x).sum(), x)
    torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        halved = layer_of(kind).bfloat16()
        assert halved(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
    assert not onednn_calls


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layer = layer_of(GeluLinear)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = functional.gelu(functional.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer(x), want)
