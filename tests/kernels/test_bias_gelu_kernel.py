from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare, outputs_and_gradients

from cistron_kernels.bias_gelu import bias_gelu
from cistron_kernels.dispatch import override


@pytest.mark.parametrize("shape", [(1,), (1, 1, 5), (2, 3, 130), (700, 40), (3, 2100)])
def test_kernels_equal_the_reference(shape: tuple[int, ...]):
    torch.manual_seed(sum(shape))
    compare(bias_gelu, {"x": 3 * torch.randn(shape), "bias": torch.randn(shape[-1])})


def test_rows_that_lie_apart_and_columns_that_do():
    torch.manual_seed(0)
    x, bias = torch.randn(4, 3, 60), torch.randn(24)
    compare(bias_gelu, {"x": x[..., 7:31], "bias": bias})
    compare(bias_gelu, {"x": x[..., :24].transpose(0, 1), "bias": bias})
    compare(bias_gelu, {"x": torch.randn(24, 5).T, "bias": bias})


def test_no_rows():
    bias = torch.ones(8, requires_grad=True)
    with override("triton"):
        bias_gelu(torch.zeros(0, 8), bias).sum().backward()
    assert bias.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("x", "bias", "problem"),
    [
        (torch.zeros(2, 4), torch.zeros(5), r"bias must be \[F\]"),
        (torch.zeros(()), torch.zeros(1), r"bias must be \[F\]"),
        (torch.zeros(2, 4, dtype=torch.long), torch.zeros(4), "floating-point"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(x: torch.Tensor, bias: torch.Tensor, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        bias_gelu(x, bias)
    assert f"x {list(x.shape)}" in str(caught.value)


def test_custom_ops_are_registered_as_they_behave():
    from cistron_kernels.bias_gelu import kernel

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, bias = torch.randn(3, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    torch.library.opcheck(kernel.bias_gelu, (x, bias), test_utils=tests)
    torch.library.opcheck(kernel.bias_gelu_backward, (x.detach(), bias.detach(), torch.ones(3, 24)), test_utils=tests)


def test_compiles_into_one_graph():
    tensors = {"x": torch.randn(3, 24), "bias": torch.randn(24)}
    torch.compiler.reset()
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    with override("triton"):
        want = outputs_and_gradients(bias_gelu, tensors, {})
        got = outputs_and_gradients(compiled, tensors, {})
    torch.testing.assert_close(got, want, rtol=0, atol=0)
