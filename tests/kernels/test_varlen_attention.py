import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cistron_kernels.varlen_attention import reference, varlen_attention


def masked_attention(q, k, v, offsets, causal, scale):
    """One dense softmax over all tokens, with a mask that separates the documents."""
    document = torch.bucketize(torch.arange(len(q)), torch.tensor(offsets[1:]), right=True)
    allowed = document[:, None] == document[None, :]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    scores = torch.einsum("tad,rad->atr", q, k) * scale
    return torch.einsum("atr,rad->tad", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offsets", [[0, 9], [0, 1, 4, 9], [0, 4, 4, 9], [0, 3, 6, 9], [0, 0, 2, 4, 6, 9, 9]])
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


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability", "expected"),
    [
        (torch.bfloat16, 24, (8, 0), True),
        (torch.float16, 128, (9, 0), True),
        (torch.float32, 64, (9, 0), False),
        (torch.bfloat16, 20, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
    ],
)
def test_where_one_kernel_takes_all_documents(dtype, head_size, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with FakeTensorMode():
        assert reference.has_packed_kernel(torch.empty(5, 2, head_size, dtype=dtype, device="cuda")) == expected
        assert not reference.has_packed_kernel(torch.empty(5, 2, head_size, dtype=dtype))


@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (True, (-1, 0))])
def test_the_call_of_the_packed_kernel(causal, window, monkeypatch):
    """Without a GPU, torch can still check the call: tensors without memory on a device that is not there."""
    calls = []

    def recorded(*args, **options):
        calls.append((args, options))
        return torch_varlen_attn(*args, **options)

    torch_varlen_attn = reference.varlen_attn
    monkeypatch.setattr(reference, "varlen_attn", recorded)
    monkeypatch.setattr(reference, "has_packed_kernel", lambda q: True)
    offsets = torch.tensor([0, 5, 7, 16])
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(16, 2, 24, dtype=torch.bfloat16, device="cuda")
        out = varlen_attention(q, q, q, offsets, causal=causal, scale=0.3)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
    [(args, options)] = calls
    assert args[3].dtype == torch.int32
    assert args[3].device.type == "cuda"
    assert args[5:] == (9, 9)
    assert options == {"scale": 0.3, "window_size": window}
