from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare, outputs_and_gradients

from cistron_kernels.dispatch import override
from cistron_kernels.layer_norm import add_layer_norm, layer_norm

TENSORS = {"x": (3, 24), "weight": (24,), "bias": (24,), "residual": (3, 24)}


def drawn(*shape: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(sum(shape))
    return {"x": torch.randn(shape) * 2 + 1, "weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1])}


@pytest.mark.parametrize("shape", [(5,), (1, 1, 7), (2, 3, 129), (500, 64)])
def test_kernels_equal_the_reference(shape: tuple[int, ...]):
    tensors = drawn(*shape)
    compare(layer_norm, tensors, eps=1e-5)
    compare(add_layer_norm, {**tensors, "residual": torch.randn(shape)}, eps=1e-3)


def test_constant_rows_and_rows_that_are_not_contiguous():
    tensors = drawn(5, 24)
    tensors["x"][2] = 3.0
    compare(layer_norm, {**tensors, "x": tensors["x"].T.contiguous().T}, eps=1e-5)


@pytest.mark.parametrize("weight", [torch.randn(48)[::2], torch.tensor(2.0).expand(24)])
def test_weights_that_are_not_contiguous(weight: torch.Tensor):
    x, grads = torch.randn(5, 24, requires_grad=True), []
    for backend in ("torch", "triton"):
        with override(backend):
            y = layer_norm(x, weight, weight, eps=1e-5)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_the_sum_has_the_wider_dtype_and_each_input_its_own_gradient(narrow: str):
    tensors = {**drawn(3, 24), "residual": torch.randn(3, 24)}
    tensors[narrow] = tensors[narrow].bfloat16()
    with override("torch"):
        want, want_grads = outputs_and_gradients(add_layer_norm, tensors, {"eps": 1e-5})
    with override("triton"):
        got, got_grads = outputs_and_gradients(add_layer_norm, tensors, {"eps": 1e-5})
    assert [y.dtype for y in got] == [y.dtype for y in want] == [tensors["x"].dtype, torch.float32]
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)  # The interpreter cuts bf16 instead of rounding.
    for name, grad in want_grads.items():
        assert got_grads[name].dtype == tensors[name].dtype
        torch.testing.assert_close(got_grads[name], grad, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"weight": torch.zeros(23)}, r"weight and bias must be \[H\]"),
        ({"bias": torch.zeros(1)}, r"weight and bias must be \[H\]"),
        ({"residual": torch.zeros(2, 24)}, "residual must have the shape"),
        ({"x": torch.zeros(3, 24, dtype=torch.long)}, "floating-point"),
        ({"bias": torch.zeros(24, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(changed: dict[str, torch.Tensor], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        add_layer_norm(**{name: torch.zeros(shape) for name, shape in TENSORS.items()} | changed, eps=1e-5)
    assert "x [3, 24]" in str(caught.value)


def test_custom_ops_are_registered_as_they_behave():
    from cistron_kernels.layer_norm import kernel

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight, bias = (tensor.requires_grad_() for tensor in drawn(3, 24).values())
    narrow = x.detach().bfloat16()
    for op, arguments in [
        (kernel.layer_norm, (x, weight, bias, 1e-5, torch.bfloat16)),
        (kernel.add_layer_norm, (narrow, x, weight, bias, 1e-5, torch.bfloat16)),
        (kernel.layer_norm_backward, (x.detach(), weight.detach(), narrow, x.detach(), 1e-5, torch.bfloat16)),
    ]:
        torch.library.opcheck(op, arguments, test_utils=tests)


def test_compiles_into_one_graph():
    tensors = {**drawn(3, 24), "residual": torch.randn(3, 24)}
    torch.compiler.reset()
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    with override("triton"):
        want = outputs_and_gradients(add_layer_norm, tensors, {"eps": 1e-5})
        got = outputs_and_gradients(compiled, tensors, {"eps": 1e-5})
    torch.testing.assert_close(got, want, rtol=0, atol=0)
