from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.harness import assert_close, compare, fenced

from cistron_kernels.dispatch import override
from cistron_kernels.rope import rope, rope_pair, rotate, rotate_pair, rotation

SHAPES = [((1, 1, 2), ()), ((7, 3, 16), ()), ((2, 5, 15, 24), ()), ((2, 5, 4, 64), (2,)), ((3, 2, 4, 20, 4), (1, 2))]
"""Of q and k, and of what stands before the positions' own dimension."""


def inputs(shape: tuple[int, ...], lead: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(sum(shape))
    positions = torch.randint(0, 3000, (*lead, shape[-3]))
    inv_freq = 1e4 ** -(torch.arange(shape[-1] // 2) / (shape[-1] / 2))
    return {"q": torch.randn(shape), "k": torch.randn(shape)}, positions, inv_freq


@pytest.mark.parametrize(("shape", "lead"), SHAPES)
def test_kernels_equal_the_reference(shape: tuple[int, ...], lead: tuple[int, ...]):
    tensors, positions, inv_freq = inputs(shape, lead)
    cos, sin = rotation(positions, inv_freq)
    compare(lambda q, k: rope_pair(q, k, positions, inv_freq, scaling=16.0), tensors)
    compare(lambda q, k: rotate_pair(q, k, cos, sin), tensors)
    compare(lambda q: rope(q, positions, inv_freq), {"q": tensors["q"]})
    compare(lambda q: rotate(q, cos, sin), {"q": tensors["q"]})


def test_slices_of_a_fused_projection_are_read_where_they_stand():
    fused = torch.randn(2, 5, 3, 4, 8)
    positions, inv_freq = torch.arange(5), torch.tensor([1.0, 0.3, 0.1, 0.03])
    q, k, _ = fused.unbind(dim=-3)
    compare(lambda q, k: rope_pair(q, k, positions, inv_freq), {"q": q, "k": k})


def test_heads_before_tokens_and_channels_that_are_not_contiguous():
    positions, inv_freq = torch.arange(5), torch.tensor([1.0, 0.3, 0.1, 0.03])
    by_head, by_channel = torch.randn(2, 4, 5, 8).transpose(1, 2), torch.randn(2, 5, 8, 4).mT
    compare(lambda q, k: rope_pair(q, k, positions, inv_freq), {"q": by_head, "k": by_channel})


@pytest.mark.parametrize("scaling", [1.0, 3.0, 128.0])
def test_angles_are_exact_at_a_million(scaling: float):
    positions = torch.tensor([0, 1, 8_191, 131_071, 999_999, 1_048_576])
    inv_freq = (1e4 ** -(torch.arange(64) / 64)).bfloat16().float()
    x = torch.randn(6, 1, 128)
    with override("triton"):
        got = rope(x, positions, inv_freq, scaling=scaling)
    angles = ((positions.float() / scaling)[:, None, None] * inv_freq).double()
    assert_close(got, rotate(x, angles.cos(), angles.sin()), 3e-7, "rotation")


@pytest.mark.parametrize(("more", "problem"), [(None, "is not finite"), (1, "wrote outside")])
def test_a_kernel_that_is_not_launched_or_goes_one_token_too_far_is_noticed(
    more: int | None, problem: str, monkeypatch: pytest.MonkeyPatch
):
    from cistron_kernels.rope import kernel

    class Wrong:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: Any, **constants: Any) -> None:
                *tensors, tokens = arguments[:9]
                if more is not None:
                    real[grid](*tensors, tokens + more, *arguments[9:], **constants)

            return launch

    real = kernel.rotate_kernel
    monkeypatch.setattr(kernel, "rotate_kernel", Wrong())
    tensors, positions, inv_freq = inputs((7, 3, 16), ())
    with pytest.raises(AssertionError, match=problem):
        compare(lambda q: rope(q, positions, inv_freq), {"q": tensors["q"]})


def test_one_output_alone_has_a_gradient():
    tensors, positions, inv_freq = inputs((3, 2, 8), ())
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    upstream = torch.randn(3, 2, 8)
    with override("triton"):
        grad_q, grad_k = torch.autograd.grad(rope_pair(*leaves, positions, inv_freq)[1], leaves, upstream)
    assert not grad_q.any()
    assert_close(grad_k, rope(upstream, -positions, inv_freq), 1e-6, "gradient of k")


def test_tables_of_other_strides_and_dtypes():
    tensors, positions, inv_freq = inputs((3, 2, 8), ())
    cos, sin = rotation(positions, inv_freq)
    sin = fenced(sin.mT.contiguous()).mT
    compare(lambda q, k: rotate_pair(q, k, cos, sin), tensors)


def test_gradients_of_the_angles_come_from_the_reference():
    x, cos, sin = torch.randn(3, 2, 8), *rotation(torch.arange(3), torch.ones(4))
    compare(rotate, {"x": x, "cos": cos, "sin": sin})


def test_half_precision_is_rounded_once():
    """The interpreter truncates where a GPU rounds to the nearest."""
    tensors, positions, inv_freq = inputs((4, 2, 32), ())
    q = tensors["q"].bfloat16()
    with override("triton"):
        got = rope(q, positions, inv_freq)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rope(q.float(), positions, inv_freq), rtol=2**-7, atol=1e-6)


def test_a_token_turns_alike_wherever_it_stands():
    tensors, _, inv_freq = inputs((5, 3, 16), ())
    with override("triton"):
        q, k = rope_pair(**tensors, positions=torch.tensor([0, 1, 2, 0, 1]), inv_freq=inv_freq)
        alone = rope_pair(tensors["q"][3:], tensors["k"][3:], torch.arange(2), inv_freq)
    assert torch.equal(q[3:], alone[0])
    assert torch.equal(k[3:], alone[1])


Q, POSITIONS, FREQUENCIES = torch.zeros(3, 2, 8), torch.arange(3), torch.ones(4)
TABLE = torch.zeros(3, 1, 4)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: rope(torch.zeros(3, 2, 7), POSITIONS, FREQUENCIES), "even D"),
        (lambda: rope(torch.zeros(3, 8), POSITIONS, FREQUENCIES), r"x must be \[..., L, A, D\]"),
        (lambda: rope(Q, POSITIONS, torch.ones(8)), r"inv_freq must be \[D/2\]"),
        (lambda: rope(Q, POSITIONS[:2], FREQUENCIES), "positions must be integers"),
        (lambda: rope(Q, POSITIONS.float(), FREQUENCIES), "positions must be integers"),
        (lambda: rope(Q, POSITIONS.expand(2, 3), FREQUENCIES), "positions must be integers"),
        (lambda: rope(Q, POSITIONS, FREQUENCIES, scaling=0.0), "scaling must be positive"),
        (lambda: rope(Q.long(), POSITIONS, FREQUENCIES), "floating-point"),
        (lambda: rope_pair(Q, Q[:, :1], POSITIONS, FREQUENCIES), "one shape and dtype"),
        (lambda: rope_pair(Q, Q.bfloat16(), POSITIONS, FREQUENCIES), "one shape and dtype"),
        (lambda: rotate(Q, TABLE, TABLE[..., :2]), "cos and sin must be"),
        (lambda: rotate(Q, TABLE[:2], TABLE[:2]), "cos and sin must broadcast"),
        (lambda: rotate_pair(Q, Q, TABLE, TABLE.to("meta")), "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(call: Callable[[], object], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        call()
    assert "[3, " in str(caught.value)


@pytest.mark.parametrize("pair", [False, True])
def test_operators_are_registered_in_full(pair: bool):
    from cistron_kernels.rope import kernel

    tensors, positions, inv_freq = inputs((3, 2, 8), ())
    heads = [tensor.requires_grad_() for tensor in tensors.values()][: 1 + pair]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.rope, (heads, positions, inv_freq, 2.0, False), test_utils=checks)
    torch.library.opcheck(kernel.rotate, (heads, *rotation(positions, inv_freq), False), test_utils=checks)


def test_compiles_whole():
    tensors, positions, inv_freq = inputs((3, 2, 8), ())
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = rope_pair(q, k, positions, inv_freq)
        q, k = rotate_pair(q, k, *rotation(positions, inv_freq))
        return (q * k.square()).sum()

    with override("triton"):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, expected)
