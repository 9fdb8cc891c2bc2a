from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare, outputs_and_gradients

from cistron_kernels.dispatch import override
from cistron_kernels.rms_norm import add_rms_norm, rms_norm

OPTIONS = {"eps": 1e-6, "eps_inside": False}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("shape", [(2,), (1, 1, 7), (2, 3, 129), (500, 64)])
def test_kernels_equal_the_reference(shape: tuple[int, ...], inside: bool):
    torch.manual_seed(sum(shape))
    tensors = {"x": torch.randn(shape), "weight": torch.randn(shape[-1])}
    compare(rms_norm, tensors, eps=1e-6, eps_inside=inside)
    compare(add_rms_norm, {**tensors, "residual": torch.randn(shape)}, eps=1e-3, eps_inside=inside)


@pytest.mark.parametrize("inside", [False, True])
def test_rows_of_zeros(inside: bool):
    x = torch.randn(4, 24)
    x[1:3] = 0
    compare(rms_norm, {"x": x, "weight": torch.randn(24)}, eps=1e-6, eps_inside=inside)


def test_rows_that_are_not_contiguous():
    x = torch.randn(24, 5).T
    compare(rms_norm, {"x": x, "weight": torch.randn(24)}, **OPTIONS)


@pytest.mark.parametrize("weight", [torch.randn(48)[::2], torch.tensor(2.0).expand(24)])
def test_weights_that_are_not_contiguous(weight: torch.Tensor):
    x = torch.randn(5, 24, requires_grad=True)
    grads = []
    for backend in ("torch", "triton"):
        with override(backend):
            grads.append(torch.autograd.grad(rms_norm(x, weight, **OPTIONS).square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_no_rows():
    x, weight = torch.zeros(0, 24, requires_grad=True), torch.ones(24, requires_grad=True)
    with override("triton"):
        rms_norm(x, weight, **OPTIONS).sum().backward()
    assert weight.grad.abs().sum() == 0


def test_rows_too_wide_for_the_registers_take_the_reference():
    x, weight = torch.randn(1, (1 << 14) + 1), torch.ones((1 << 14) + 1)
    with override("triton"):
        y = rms_norm(x, weight, **OPTIONS)
    with override("torch"):
        assert torch.equal(y, rms_norm(x, weight, **OPTIONS))


@pytest.mark.parametrize("narrow", ["x", "residual"])
def test_the_sum_has_the_wider_dtype_and_each_input_its_own_gradient(narrow: str):
    torch.manual_seed(1)
    tensors = {"x": torch.randn(3, 24), "residual": torch.randn(3, 24), "weight": torch.randn(24)}
    tensors[narrow] = tensors[narrow].bfloat16()
    with override("torch"):
        want, want_grads = outputs_and_gradients(add_rms_norm, tensors, OPTIONS)
    with override("triton"):
        got, got_grads = outputs_and_gradients(add_rms_norm, tensors, OPTIONS)
    assert [y.dtype for y in got] == [y.dtype for y in want] == [tensors["x"].dtype, torch.float32]
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)  # The interpreter cuts bf16 instead of rounding.
    for name, grad in want_grads.items():
        assert got_grads[name].dtype == tensors[name].dtype
        torch.testing.assert_close(got_grads[name], grad, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_gives_what_the_product_behind_it_reads(backend: str):
    x, weight = torch.randn(3, 24), torch.randn(24)
    with override(backend):
        plain = rms_norm(x, weight, **OPTIONS)
        with torch.autocast("cpu", torch.bfloat16):
            y, total = add_rms_norm(torch.zeros(3, 24).bfloat16(), x, weight, **OPTIONS)
            alone = rms_norm(x, weight, **OPTIONS)
            assert rms_norm(x.double(), weight, **OPTIONS).dtype == torch.float64
    for found in (alone, y):
        torch.testing.assert_close(found, plain.bfloat16(), rtol=2**-7 if backend == "triton" else 0, atol=0)
    assert torch.equal(total, x)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "problem"),
    [
        (torch.zeros(2, 4), torch.zeros(5), None, r"weight must be \[H\]"),
        (torch.zeros(()), torch.zeros(1), None, r"weight must be \[H\]"),
        (torch.zeros(2, 4), torch.zeros(4), torch.zeros(2, 3), "residual must have the shape"),
        (torch.zeros(2, 4, dtype=torch.long), torch.zeros(4), None, "floating-point"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), None, "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(x, weight, residual, problem):
    added = {} if residual is None else {"residual": residual}
    with pytest.raises(ValueError, match=problem) as caught:
        (add_rms_norm if added else rms_norm)(x=x, weight=weight, **added, **OPTIONS)
    assert str(list(x.shape)) in str(caught.value)


def test_custom_ops_are_registered_as_they_behave():
    from cistron_kernels.rms_norm import kernel

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight = torch.randn(3, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    narrow = x.detach().bfloat16()
    for op, arguments in [
        (kernel.rms_norm, (x, weight, 1e-6, True, torch.bfloat16)),
        (kernel.add_rms_norm, (narrow, x, weight, 1e-6, True, torch.bfloat16)),
        (kernel.rms_norm_backward, (x.detach(), weight.detach(), narrow, x.detach(), 1e-6, True, torch.bfloat16)),
    ]:
        torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph(backend: str):
    tensors = {"x": torch.randn(3, 24), "residual": torch.randn(3, 24), "weight": torch.randn(24)}
    torch.compiler.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    with override(backend):
        want = outputs_and_gradients(add_rms_norm, tensors, OPTIONS)
        got = outputs_and_gradients(compiled, tensors, OPTIONS)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
