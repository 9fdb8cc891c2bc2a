from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.harness import assert_close, compare

from cistron_kernels.dispatch import override
from cistron_kernels.hyena_fir import gated_fir, hyena_fir

pytest.importorskip("triton", reason="needs triton's interpreter")


def gated(batch: int, channels: int, length: int, groups: int, width: int, projection_width: int = 3) -> dict[str, Any]:
    torch.manual_seed(length)
    return {
        "projected": torch.randn(batch, 3 * channels, length),
        "projection_taps": torch.randn(3 * channels, projection_width),
        "taps": torch.randn(groups, width),
    }


def test_a_short_gated_filter_with_a_skip_per_group_and_a_group_of_an_odd_size():
    compare(gated_fir, {**gated(2, 3, 37, 1, 7), "skip": torch.randn(1)}, order="correlation")


def test_a_medium_gated_filter_over_its_own_and_two_earlier_chunks():
    compare(gated_fir, {**gated(1, 2, 203, 1, 128), "skip": torch.randn(2)}, order="impulse")


@pytest.mark.parametrize("length", [1, 70])
def test_histories_and_their_gradients(length: int):
    tensors = gated(1, 2, length, 1, 67, projection_width=2)
    histories = {"projection_history": torch.randn(1, 6, 1), "history": torch.randn(1, 2, 66)}
    compare(gated_fir, tensors | histories, order="impulse")


def test_a_history_of_one_filter_only_and_rows_of_their_own_length():
    tensors = gated(3, 2, 5, 1, 4)
    lengths = torch.tensor([0, 2, 5])
    compare(gated_fir, {**tensors, "history": torch.randn(3, 2, 3)}, order="correlation", lengths=lengths)


def test_more_channels_than_a_tile_holds_and_stretches_of_several_chunks(monkeypatch: pytest.MonkeyPatch):
    from cistron_kernels.hyena_fir import launching

    monkeypatch.setattr(launching, "num_multiprocessors", lambda device: 1)
    monkeypatch.setattr(launching, "FORWARD_WAVES", 1)
    monkeypatch.setattr(launching, "BACKWARD_WAVES", 2)
    compare(gated_fir, gated(1, 17, 150, 1, 7), order="correlation")


@pytest.mark.parametrize(("channels", "groups", "width", "length"), [(3, 3, 3, 129), (6, 2, 1, 17), (2, 1, 129, 65)])
def test_a_filter_alone(channels: int, groups: int, width: int, length: int):
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(length, 2, channels).permute(1, 2, 0),
        "taps": torch.randn(groups, width),
        "skip": torch.randn(channels),
        "history": torch.randn(2, channels, width - 1) if groups == 1 else None,
    }
    compare(hyena_fir, tensors, order="impulse")


def test_chunks_and_single_rows_equal_the_whole_batch():
    tensors = gated(2, 2, 150, 1, 40)
    with override("triton"), torch.no_grad():
        whole, *_ = gated_fir(**tensors, order="correlation")
        single, *_ = gated_fir(**tensors | {"projected": tensors["projected"][1:]}, order="correlation")
        states, pieces = {}, []
        for piece in tensors["projected"].split([1, 64, 85], dim=-1):
            y, *last = gated_fir(**tensors | {"projected": piece}, **states, order="correlation")
            states = dict(zip(("projection_history", "history"), last, strict=True))
            pieces.append(y)
    assert torch.equal(single[0], whole[1])
    assert_close(torch.cat(pieces, dim=-1), whole, 1e-6, "the sequence in chunks")


def test_results_lie_as_products_of_matrices_take_them():
    tensors = gated(2, 2, 32, 1, 7)
    rows = torch.randn(6, 2, 32, requires_grad=True)
    with override("triton"):
        y, *_ = gated_fir(**tensors | {"projected": rows.transpose(0, 1)}, order="correlation")
    assert y.transpose(1, 2).flatten(0, 1).data_ptr() == y.data_ptr()
    y.sum().backward()
    assert rows.grad is not None
    assert rows.grad.is_contiguous()


def test_bf16_is_rounded_twice_at_most():
    tensors = gated(1, 4, 100, 2, 7)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    exact, *_ = gated_fir(**{name: tensor.double() for name, tensor in rounded.items()}, order="correlation")
    with override("triton"):
        got, history, products = gated_fir(**rounded, order="correlation")
    assert got.dtype == history.dtype == products.dtype == torch.bfloat16
    assert_close(got, exact, 4e-3, "bf16")


def opcheck_arguments() -> list[tuple[Any, ...]]:
    x, projection_taps, taps = gated(1, 4, 20, 2, 5).values()
    leaves = [tensor.requires_grad_() for tensor in (x, projection_taps, taps)]
    return [
        (*leaves, torch.randn(4), torch.randn(1, 12, 2), torch.randn(1, 4, 4), True),
        (leaves[0], None, taps.detach(), None, None, None, False),
    ]


@pytest.mark.parametrize("arguments", opcheck_arguments())
def test_pytorch_knows_the_operation(arguments: tuple[Any, ...]):
    from cistron_kernels.hyena_fir import kernel

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.fir, arguments, test_utils=checks)
    with torch.no_grad():
        grad_y = torch.randn_like(kernel.fir(*arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(kernel.fir_backward, (*detached[:-1], grad_y, arguments[-1]), test_utils=checks[:2])


def test_it_compiles_into_one_graph():
    tensors = gated(1, 2, 20, 1, 4)
    taps = tensors["taps"].requires_grad_()

    def loss(function: Callable[..., Any]) -> torch.Tensor:
        return function(**tensors, order="impulse")[0].square().sum()

    with override("triton"):
        want = torch.autograd.grad(loss(gated_fir), taps)[0]
        compiled = torch.compile(gated_fir, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(loss(compiled), taps)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"projected": torch.zeros(2, 10, 5)}, r"\[B, 3D, L\]"),
        ({"projected": torch.zeros(2, 12, 0)}, "at least one token"),
        ({"projection_taps": torch.zeros(9, 3)}, r"projection_taps must be \[3D, P\]"),
        ({"projection_history": torch.zeros(2, 12, 3)}, r"projection_history must be \[B, 3D, P-1\]"),
        ({"taps": torch.zeros(3, 7)}, "groups must divide"),
        ({"skip": torch.zeros(3)}, "one value per group or per channel"),
        ({"history": torch.zeros(2, 4, 7)}, r"history must be \[B, channels, K-1\]"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, "whole numbers"),
        ({"lengths": torch.zeros(2)}, "whole numbers"),
        ({"order": "backwards"}, "correlation, impulse"),
        ({"taps": torch.zeros(2, 7, dtype=torch.long)}, "floating-point"),
        ({"taps": torch.zeros(2, 7, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(change: dict[str, Any], problem: str):
    arguments = {**gated(2, 4, 5, 2, 7), "order": "impulse", **change}
    with pytest.raises(ValueError, match=problem) as caught:
        gated_fir(**arguments)
    assert str(list(arguments["projected"].shape)) in str(caught.value)


def test_bad_arguments_of_the_filter_alone_are_refused():
    with pytest.raises(ValueError, match="hyena_fir: the input must be"):
        hyena_fir(torch.zeros(4, 5), torch.zeros(2, 7), order="impulse")
    with pytest.raises(ValueError, match="groups must divide"):
        hyena_fir(torch.zeros(1, 4, 5), torch.zeros(3, 7), order="impulse")
