from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare, outputs_and_gradients

from cistron_kernels.cross_entropy import cross_entropy, reference
from cistron_kernels.dispatch import override


def drawn(rows: int, classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows + classes)
    targets = torch.randint(classes, (rows,))
    targets[::3] = -100
    return {"logits": 4 * torch.randn(rows, classes), "targets": targets, "weights": torch.rand(rows)}


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (2, 33), (75, 33), (9, 512), (5, 1000)])
def test_kernels_equal_the_reference(rows: int, classes: int):
    tensors = drawn(rows, classes)
    compare(cross_entropy, tensors)
    compare(cross_entropy, {**tensors, "weights": None})


def test_logits_that_are_not_contiguous():
    tensors = drawn(9, 40)
    compare(cross_entropy, {**tensors, "logits": torch.randn(9, 60)[:, 10:50]})
    compare(cross_entropy, {**tensors, "logits": torch.randn(40, 9).T})


def test_no_target_and_no_row_give_zeros():
    tensors = drawn(4, 20) | {"targets": torch.full((4,), -100)}
    tensors["logits"][2] = 1e30
    compare(cross_entropy, tensors)
    with override("triton"):
        empty = torch.zeros(0, 20, requires_grad=True)
        loss, weight = cross_entropy(empty, torch.zeros(0, dtype=torch.long), None)
        loss.backward()
    assert (loss.item(), weight.item()) == (0.0, 0.0)


def test_another_ignored_id():
    tensors = drawn(9, 20) | {"targets": torch.tensor([0, 1, 2, 3, 4, 0, 19, 1, 0])}
    compare(cross_entropy, tensors, ignore_index=0)


def test_large_logits_do_not_overflow():
    tensors = drawn(4, 20)
    compare(cross_entropy, tensors | {"logits": tensors["logits"] + 1e4}, forward=1e-4, backward=1e-3)


def test_wider_vocabularies_take_the_reference():
    tensors = drawn(3, 1025)
    with override("triton"):
        loss, _ = cross_entropy(**tensors)
    with override("torch"):
        assert torch.equal(loss, cross_entropy(**tensors)[0])


@pytest.mark.parametrize("unknown", [-1, 20, 1 << 40])
def test_unknown_ids_are_refused_in_host_memory_and_elsewhere_never_read(unknown: int):
    from cistron_kernels.cross_entropy import kernel

    tensors = drawn(4, 20)
    tensors["targets"][1] = unknown
    with pytest.raises(ValueError, match="targets must be ids of 20 classes"):
        cross_entropy(**tensors)
    scored = torch.ones(4)
    got = kernel.cross_entropy(tensors["logits"], tensors["targets"], scored, -100)
    want = reference.cross_entropy(tensors["logits"], tensors["targets"], scored, ignore_index=-100)
    assert got.isnan().tolist() == want.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"logits": torch.zeros(4)}, r"logits must be \[T, V\]"),
        ({"weights": torch.zeros(3)}, r"weights \[T\]"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets must be \[T\] int64"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, r"targets must be \[T\] int64"),
        ({"targets": torch.zeros(4, dtype=torch.long, device="meta")}, "one device"),
        ({"logits": torch.zeros(4, 20, dtype=torch.long)}, "floating-point"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(changed: dict[str, torch.Tensor], problem: str):
    tensors = drawn(4, 20) | changed
    with pytest.raises(ValueError, match=problem) as caught:
        cross_entropy(**tensors)
    assert f"logits {list(tensors['logits'].shape)}" in str(caught.value)


def test_custom_ops_are_registered_as_they_behave():
    from cistron_kernels.cross_entropy import kernel

    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    logits, targets, scored = drawn(4, 20).values()
    torch.library.opcheck(kernel.cross_entropy, (logits.requires_grad_(), targets, scored, -100), test_utils=tests)
    arguments = (logits.detach(), targets, scored, torch.ones(()).expand(4))
    torch.library.opcheck(kernel.cross_entropy_backward, arguments, test_utils=tests)


def test_compiles_into_one_graph():
    tensors = drawn(4, 20)
    torch.compiler.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with override("triton"):
        want = outputs_and_gradients(cross_entropy, tensors, {})
        got = outputs_and_gradients(compiled, tensors, {})
    torch.testing.assert_close(got, want, rtol=0, atol=0)
