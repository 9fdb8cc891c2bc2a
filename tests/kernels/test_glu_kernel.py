from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare, outputs_and_gradients

from cistron_kernels.dispatch import override
from cistron_kernels.glu import Activation, glu


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 5), (2, 3, 130), (70, 40), (3, 1100)])
def test_kernels_equal_the_reference(shape: tuple[int, ...], activation: Activation):
    torch.manual_seed(sum(shape))
    compare(glu, {"gate": 3 * torch.randn(shape), "value": torch.randn(shape)}, activation=activation)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_halves_of_one_tensor(activation: Activation):
    torch.manual_seed(0)
    gate, value = torch.randn(2, 3, 2 * 48).chunk(2, dim=-1)
    assert not gate.is_contiguous()
    compare(glu, {"gate": gate, "value": value}, activation=activation)
    compare(glu, {"gate": gate.transpose(0, 2), "value": value.transpose(0, 2)}, activation=activation)


def test_no_rows():
    gate = torch.zeros(0, 8, requires_grad=True)
    with override("triton"):
        glu(gate, torch.zeros(0, 8), activation="gelu").sum().backward()
    assert gate.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("value", "activation", "problem"),
    [
        (torch.zeros(2, 5), "gelu", "one shape and dtype"),
        (torch.zeros(2, 4).bfloat16(), "gelu", "one shape and dtype"),
        (torch.zeros(2, 4, device="meta"), "gelu", "one device"),
        (torch.zeros(2, 4), "silu", "activation must be one of identity, gelu"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(value: torch.Tensor, activation: Activation, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        glu(torch.zeros(2, 4), value, activation=activation)
    assert "gate [2, 4]" in str(caught.value)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        glu(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), activation="gelu")


def test_custom_ops_are_registered_as_they_behave():
    from cistron_kernels.glu import kernel

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    gate, value = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    torch.library.opcheck(kernel.glu, (gate, value, True), test_utils=tests)
    torch.library.opcheck(
        kernel.glu_backward, (gate.detach(), value.detach(), torch.ones(3, 24), True), test_utils=tests
    )


def test_compiles_into_one_graph():
    tensors = {"gate": torch.randn(3, 24), "value": torch.randn(3, 24)}
    torch.compiler.reset()
    compiled = torch.compile(glu, fullgraph=True, backend="aot_eager")
    with override("triton"):
        want = outputs_and_gradients(glu, tensors, {"activation": "gelu"})
        got = outputs_and_gradients(compiled, tensors, {"activation": "gelu"})
    torch.testing.assert_close(got, want, rtol=0, atol=0)
