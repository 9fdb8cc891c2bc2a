from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import compare

from cistron_kernels.cross_entropy import reference, score_logprob
from cistron_kernels.dispatch import override


def drawn(rows: int, channels: int, classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows + channels + classes)
    return {
        "hidden": torch.randn(rows, channels),
        "weight": torch.randn(classes, channels),
        "targets": torch.randint(classes, (rows,)),
    }


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_reference_equals_the_definition_by_pieces(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", 7 * 20)
    tensors = drawn(rows, 12, 20)
    logits = tensors["hidden"].double() @ tensors["weight"].double().T
    want = logits.log_softmax(-1)[torch.arange(rows), tensors["targets"]]
    with override("torch"):
        got = score_logprob(**tensors)
        rounded = score_logprob(tensors["hidden"].bfloat16(), tensors["weight"].bfloat16(), tensors["targets"])
    assert got.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded.double(), want, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("rows", "channels", "classes"), [(1, 1, 1), (3, 16, 33), (70, 50, 33), (33, 20, 200), (2, 40, 512)]
)
def test_kernel_equals_the_reference(rows: int, channels: int, classes: int):
    compare(score_logprob, drawn(rows, channels, classes))


def test_hidden_states_that_are_not_contiguous():
    tensors = drawn(9, 20, 33)
    compare(score_logprob, {**tensors, "hidden": torch.randn(9, 50)[:, 5:25]})
    compare(score_logprob, {**tensors, "hidden": torch.randn(20, 9).T, "weight": torch.randn(20, 33).T})


def test_bf16_is_not_rounded_on_the_way():
    tensors = drawn(40, 32, 33)
    tensors = tensors | {name: tensors[name].bfloat16() for name in ("hidden", "weight")}
    with override("torch"):
        want = score_logprob(**tensors)
    with override("triton"):
        torch.testing.assert_close(score_logprob(**tensors), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_token_and_a_vocabulary_too_wide_for_one_tile(backend: str):
    with override(backend):
        assert score_logprob(**drawn(0, 4, 20)).shape == (0,)
        assert score_logprob(**drawn(2, 4, 513)).isfinite().all()


@pytest.mark.parametrize("unknown", [-1, 20, 1 << 40])
def test_unknown_ids_are_refused_in_host_memory_and_elsewhere_never_read(unknown: int):
    from cistron_kernels.cross_entropy import kernel

    tensors = drawn(3, 8, 20)
    tensors["targets"][1] = unknown
    with pytest.raises(ValueError, match="targets must be ids of 20 classes"):
        score_logprob(**tensors)
    for form in (kernel, reference):
        assert form.score_logprob(**tensors).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"hidden": torch.zeros(3, 9)}, r"weight \[V, H\]"),
        ({"hidden": torch.zeros(1, 3, 8)}, r"hidden must be \[T, H\]"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets must be \[T\]"),
        ({"weight": torch.zeros(20, 8, device="meta")}, "one device"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.long)}, "floating-point"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(changed: dict[str, torch.Tensor], problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        score_logprob(**drawn(3, 8, 20) | changed)
    assert "weight [20, 8]" in str(caught.value)


def test_the_custom_op_is_registered_as_it_behaves_and_compiles_into_one_graph():
    from cistron_kernels.cross_entropy import kernel

    tensors = drawn(3, 8, 20)
    torch.library.opcheck(kernel.score_logprob, tuple(tensors.values()), test_utils=("test_schema", "test_faketensor"))
    torch.compiler.reset()
    with override("triton"):
        compiled = torch.compile(score_logprob, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**tensors), score_logprob(**tensors))


def test_autocast_does_not_round_the_logits():
    tensors = drawn(5, 64, 20)
    with override("torch"):
        plain = score_logprob(**tensors)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(score_logprob(**tensors), plain)
