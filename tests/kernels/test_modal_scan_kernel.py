"""Sizes are small because kernels are interpreted: a tile is 4 chunks of 16 tokens there, so 70 tokens take two."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import assert_close, compare

from cistron_kernels.dispatch import override
from cistron_kernels.modal_scan import gated_modal_scan, modal_scan

POLES = 3


def draw(batch: int, channels: int, length: int, *, state: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    tensors = {
        "x": torch.randn(batch, channels, length),
        "log_poles": -torch.logspace(-4, 1, channels * POLES).view(channels, POLES),
        "residues": torch.randn(channels, POLES),
    }
    return {**tensors, "state": torch.randn(batch, channels, POLES)} if state else tensors


def draw_gated(batch: int, channels: int, length: int, *, state: bool = True) -> dict[str, torch.Tensor]:
    tensors = draw(batch, channels, length, state=state)
    del tensors["x"]
    if state:
        tensors["projection_history"] = torch.randn(batch, 3 * channels, 2)
    return {
        "projected": torch.randn(batch, 3 * channels, length),
        "projection_taps": torch.randn(3 * channels, 3),
        "skip": torch.randn(channels),
        **tensors,
    }


@pytest.mark.parametrize(("batch", "length", "state"), [(1, 1, True), (2, 16, False), (1, 70, True), (1, 128, False)])
def test_kernels_equal_the_reference(batch: int, length: int, state: bool):
    compare(modal_scan, draw(batch, 1, length, state=state))


@pytest.mark.parametrize(("channels", "length", "state"), [(1, 1, True), (2, 17, False), (1, 70, True)])
def test_gated_kernels_equal_the_reference(channels: int, length: int, state: bool):
    compare(gated_modal_scan, draw_gated(1, channels, length, state=state))


def test_each_rows_state_is_that_after_its_own_last_token():
    lengths = torch.tensor([0, 32, 70])
    compare(modal_scan, draw(3, 1, 70), lengths=lengths)
    compare(gated_modal_scan, draw_gated(3, 1, 20), lengths=torch.tensor([1, 0, 20]))


def test_tokens_that_are_not_neighbours_in_memory():
    tensors = draw_gated(1, 1, 20, state=False)
    tensors["projected"] = torch.randn(1, 20, 5).mT[:, 1:4]
    compare(gated_modal_scan, tensors)


def test_rows_apart_from_each_other_in_memory():
    tensors = draw_gated(2, 1, 20, state=False)
    tensors["projected"] = torch.randn(2, 4, 30)[:, 1:, 3:23]
    compare(gated_modal_scan, tensors)


def test_a_wider_projection_filter_runs_op_by_op():
    tensors = draw_gated(1, 1, 20, state=False)
    tensors["projection_taps"] = torch.randn(3, 4)
    compare(gated_modal_scan, tensors)


@override("triton", "modal_scan")
def test_chunks_equal_the_whole_and_batches_their_rows():
    tensors = draw_gated(2, 1, 70)
    projected, past = tensors.pop("projected"), tensors.pop("projection_history")
    whole, last, final = gated_modal_scan(projected, **tensors, projection_history=past)
    state, pieces = tensors.pop("state"), []
    for piece in projected[:1].split([1, 66, 3], dim=-1):
        y, past, state = gated_modal_scan(piece, **tensors, projection_history=past[:1], state=state[:1])
        pieces.append(y)
    assert_close(torch.cat(pieces, dim=-1), whole[:1], 1e-6, "y in pieces")
    assert_close(state, final[:1], 1e-6, "final state")
    assert torch.equal(past, last[:1])


def test_gradients_of_one_output_alone():
    tensors = draw(1, 1, 20)
    for backend in ("torch", "triton"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        with override(backend):
            y, final = modal_scan(**leaves)
            grads = [torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True) for out in (y, final)]
        expected = grads if backend == "torch" else expected  # noqa: F821
    for got, want in zip(sum(grads, ()), sum(expected, ()), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_an_fp32_state():
    tensors = draw_gated(1, 1, 70)
    tensors |= {name: tensors[name].bfloat16() for name in ("projected", "projection_taps", "projection_history")}
    with override("triton"):
        y, last, final = gated_modal_scan(**tensors)
    exact, _, state = gated_modal_scan(**{name: tensor.double() for name, tensor in tensors.items()})
    assert (y.dtype, last.dtype, final.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close(y, exact, 1e-2, "y")
    assert_close(final, state, 1e-5, "final state")


@pytest.mark.parametrize("lengths", [torch.tensor([20, 9, 7, 9])[::2], torch.tensor(7).expand(2)])
def test_lengths_that_are_not_contiguous(lengths: torch.Tensor):
    tensors = draw(2, 1, 20)
    with override("triton"):
        _, got = modal_scan(**tensors, lengths=lengths)
    with override("torch"):
        assert_close(got, modal_scan(**tensors, lengths=lengths)[1], 1e-5, "final state")


@pytest.mark.parametrize("gated", [False, True])
def test_padding_that_is_not_a_number_stays_out_of_the_final_state(gated: bool):
    scan, arguments = (gated_modal_scan, draw_gated(2, 1, 20)) if gated else (modal_scan, draw(2, 1, 20))
    name, lengths = "projected" if gated else "x", torch.tensor([20, 7])
    arguments[name][1, :, 7:] = torch.nan
    with override("triton"):
        *_, got = scan(**arguments, lengths=lengths)
    arguments[name][1, :, 7:] = 0.0
    with override("torch"):
        *_, want = scan(**arguments, lengths=lengths)
    assert_close(got, want, 1e-5, "final state")


@override("triton")
def test_no_tokens_to_scan():
    y, final = modal_scan(**draw(0, 1, 3))
    assert y.shape == (0, 1, 3)
    assert final.shape == (0, 1, POLES)


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_is_registered_completely(gated: bool):
    from cistron_kernels.modal_scan import kernel

    tensors = draw_gated(1, 1, 3) if gated else draw(1, 1, 3)
    names = ("projected" if gated else "x", "log_poles", "residues", "state")
    more = ("projection_taps", "skip", "projection_history") if gated else ()
    leaves = [tensors[name].requires_grad_() for name in names]
    leaves += [None, *(tensors[name].requires_grad_() for name in more)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.modal_scan, tuple(leaves), test_utils=checks)
    y, _, *kept = kernel.modal_scan(*leaves)
    inputs = [leaves[i].detach() for i in range(3)]
    gates = [leaf.detach() for leaf in leaves[5:]] if gated else [None] * 3
    arguments = (*inputs, None, *gates, *(tensor.detach() for tensor in kept), torch.ones_like(y), None)
    torch.library.opcheck(kernel.modal_scan_backward, arguments, test_utils=checks)


@override("triton")
def test_compiles_into_one_graph():
    tensors = draw_gated(1, 1, 3)
    for function, arguments in ((modal_scan, draw(1, 1, 3)), (gated_modal_scan, tensors)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(**arguments), function(**arguments), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x": torch.zeros(2, 4)}, r"x must be \[B, H, L\]"),
        ({"x": torch.zeros(1, 1, 0)}, "L >= 1"),
        ({"x": torch.zeros(1, 2, 5)}, r"log_poles and residues must be \[H, S\]"),
        ({"residues": torch.zeros(1, 4)}, r"log_poles and residues must be \[H, S\]"),
        ({"state": torch.zeros(2, 1, POLES)}, r"state must be \[B, H, S\]"),
        ({"lengths": torch.zeros(2, dtype=torch.long)}, r"lengths must be \[B\]"),
        ({"lengths": torch.zeros(1)}, "whole numbers"),
        ({"lengths": torch.zeros(1, dtype=torch.bool)}, "int32 or int64"),
        ({"lengths": torch.tensor([-1])}, "from 0 to 5"),
        ({"lengths": torch.tensor([6])}, "from 0 to 5"),
        ({"x": torch.zeros(1, 1, 5, dtype=torch.long)}, "floating-point"),
        ({"residues": torch.zeros(1, POLES, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(change: dict[str, torch.Tensor], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        modal_scan(**{**draw(1, 1, 5), **change})
    assert str(list(change.get("x", torch.zeros(1, 1, 5)).shape)) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"projected": torch.zeros(1, 4, 5)}, r"projected must be \[B, 3H, L\]"),
        ({"projection_taps": torch.zeros(4, 3)}, r"projection_taps must be \[3H, K\]"),
        ({"skip": torch.zeros(3)}, r"skip \[H\]"),
        ({"projection_history": torch.zeros(1, 3, 3)}, r"projection_history must be \[B, 3H, K-1\]"),
        ({"skip": torch.zeros(1, device="meta")}, "one device"),
    ],
)
def test_bad_arguments_of_the_gated_scan(change: dict[str, torch.Tensor], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        gated_modal_scan(**{**draw_gated(1, 1, 5), **change})
    assert str(list(change.get("projected", torch.zeros(1, 3, 5)).shape)) in str(caught.value)
