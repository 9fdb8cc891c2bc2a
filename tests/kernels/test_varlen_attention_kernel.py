from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.harness import compare

from cistron_kernels.dispatch import override
from cistron_kernels.varlen_attention import varlen_attention


def inputs(tokens: int, heads: int = 2, size: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(tokens)
    return {name: torch.randn(tokens, heads, size) for name in "qkv"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("offsets", "size"),
    [([0, 40], 8), ([0, 1, 1, 17, 33, 36], 20), ([0, 0, 3, 20, 20], 32), ([0, 16, 32], 64)],
)
def test_kernels_equal_the_reference(offsets: list[int], size: int, causal: bool):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    compare(varlen_attention, inputs(offsets[-1], 2, size), cu_seqlens=cu_seqlens, causal=causal, scale=size**-0.5)


def test_one_token_attends_to_itself():
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1).values())
    with override("triton"):
        out = varlen_attention(q, k, v, torch.tensor([0, 1]), causal=False, scale=0.25)
    torch.testing.assert_close(out, v)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert max(grad_q.abs().max(), grad_k.abs().max()) < 1e-6
    torch.testing.assert_close(grad_v, torch.ones_like(v))


def test_large_scores_do_not_overflow():
    tensors = inputs(20, 1)
    tensors["q"] *= 100
    compare(varlen_attention, tensors, cu_seqlens=torch.tensor([0, 20]), causal=True, scale=1.0, backward=1e-3)


@pytest.mark.parametrize("layout", ["fused", "heads first", "channels first"])
def test_strided_heads(layout: str):
    fused = torch.randn(19, 3, 2, 16)
    q, k, v = fused.unbind(dim=1)
    if layout == "heads first":
        q, k, v = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v))
    if layout == "channels first":
        q, k, v = (tensor.mT.contiguous().mT for tensor in (q, k, v))
    compare(varlen_attention, {"q": q, "k": k, "v": v}, cu_seqlens=torch.tensor([0, 2, 19]), causal=True, scale=0.3)


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_does_not_depend_on_the_others(causal: bool):
    tensors, options = inputs(37), {"causal": causal, "scale": 0.25}
    with override("triton"):
        together = varlen_attention(**tensors, cu_seqlens=torch.tensor([0, 18, 37]), **options)
        tail = {name: tensor[18:] for name, tensor in tensors.items()}
        alone = varlen_attention(**tail, cu_seqlens=torch.tensor([0, 19]), **options)
    assert torch.equal(together[18:], alone)


def test_half_precision():
    tensors = {name: tensor.bfloat16() for name, tensor in inputs(20).items()}
    options = {"cu_seqlens": torch.tensor([0, 20]), "causal": True, "scale": 0.25}
    with override("triton"):
        got = varlen_attention(**tensors, **options)
    assert got.dtype == torch.bfloat16
    want = varlen_attention(**{name: tensor.double() for name, tensor in tensors.items()}, **options)
    assert (got.double() - want).norm() < 5e-3 * want.norm()


def test_no_tokens_and_no_documents():
    q = torch.zeros(0, 2, 16)
    for backend in ("triton", "torch"):
        with override(backend):
            for offsets in ([0], [0, 0]):
                assert varlen_attention(q, q, q, torch.tensor(offsets), causal=True, scale=1.0).shape == q.shape


Q = torch.zeros(5, 2, 16)
OFFSETS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("q", "k", "offsets", "problem"),
    [
        (Q[0], Q[0], OFFSETS, r"must be \[T, A, D\]"),
        (Q, Q[:, :1], OFFSETS, r"must be \[T, A, D\]"),
        (Q[:, :0], Q[:, :0], OFFSETS, "at least one head"),
        (Q, Q.bfloat16(), OFFSETS, "one dtype"),
        (Q.long(), Q.long(), OFFSETS, "floating-point"),
        (Q, Q.to("meta"), OFFSETS, "one device"),
        (Q, Q, OFFSETS[None], r"must be \[N\+1\]"),
        (Q, Q, OFFSETS.float(), "int32 or int64"),
        (Q, Q, OFFSETS[:0], r"must be \[N\+1\]"),
        (Q, Q, torch.tensor([0, -1, 5]), "without decreasing"),
        (Q, Q, torch.tensor([0, 4, 2, 5]), "without decreasing"),
        (Q, Q, torch.tensor([1, 5]), "must run from 0 to 5"),
        (Q, Q, torch.tensor([0, 4]), "must run from 0 to 5"),
        (Q, Q, torch.tensor([0, 6]), "must run from 0 to 5"),
    ],
)
def test_bad_arguments_are_refused_with_their_shapes(q, k, offsets, problem: str):
    with pytest.raises(ValueError, match=problem) as caught:
        varlen_attention(q, k, q, offsets, causal=True, scale=1.0)
    assert str(list(q.shape)) in str(caught.value)


def test_operators_are_registered_in_full():
    from cistron_kernels.varlen_attention import kernel

    tensors = [tensor.requires_grad_() for tensor in inputs(5).values()]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.varlen_attention, (*tensors, OFFSETS, True, 0.5), test_utils=checks)


def test_compiles_whole():
    leaves = [tensor.requires_grad_() for tensor in inputs(5).values()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return varlen_attention(*tensors, OFFSETS, causal=True, scale=0.5).square().sum()

    with override("triton"):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled: Callable[..., torch.Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_offsets_that_no_door_has_seen_are_refused_by_the_operator():
    """On a device, and in a compiled graph, they are first looked at where the tiles are laid out."""
    from cistron_kernels.varlen_attention import kernel

    for offsets in ([0, -2, 5], [0, 6], [1, 5]):
        with pytest.raises(ValueError, match="must run from 0 to 5"):
            kernel.varlen_attention(*inputs(5).values(), torch.tensor(offsets), True, 0.5)
