import pytest
import torch

from cistron_kernels.varlen_attention import varlen_attention


def masked_attention(q, k, v, offsets, causal, scale):
    """One dense softmax over all tokens, with a mask that separates the documents."""
    document = torch.bucketize(torch.arange(len(q)), torch.tensor(offsets[1:]), right=True)
    allowed = document[:, None] == document[None, :]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    scores = torch.einsum("tad,rad->atr", q, k) * scale
    return torch.einsum("atr,rad->tad", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offsets", [[0, 9], [0, 1, 4, 9], [0, 4, 4, 9]])
def test_equals_dense_masked_attention(offsets, causal):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(9, 2, 6, generator=generator).requires_grad_() for _ in range(3)]
    upstream = torch.randn(9, 2, 6, generator=generator)
    got = varlen_attention(*inputs, torch.tensor(offsets, dtype=torch.int32), causal=causal, scale=0.7)
    want = masked_attention(*inputs, offsets, causal, 0.7)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_documents_do_not_see_each_other():
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 8, 1, 4, generator=generator)
    offsets = torch.tensor([0, 5, 8])
    before = varlen_attention(q, k, v, offsets, causal=False, scale=1.0)
    k[5:], v[5:] = 100.0, 100.0
    after = varlen_attention(q, k, v, offsets, causal=False, scale=1.0)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])
