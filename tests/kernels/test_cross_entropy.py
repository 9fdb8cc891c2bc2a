import math

import pytest
import torch

from cistron_kernels.cross_entropy import cross_entropy


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_log_sum_exp(weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator) * 4
    targets = torch.tensor([0, 4, -100, 2, -100, 1])
    weights = torch.tensor([1.0, 0.1, 7.0, 0.5, 1.0, 0.0]) if weighted else None
    loss, weight = cross_entropy(logits, targets, weights)
    want_loss = want_weight = 0.0
    for t, target in enumerate(targets.tolist()):
        if target >= 0:
            w = weights[t].item() if weighted else 1.0
            row = logits[t].tolist()
            want_loss += w * (math.log(sum(math.exp(z) for z in row)) - row[target])
            want_weight += w
    assert loss.item() == pytest.approx(want_loss, rel=1e-5)
    assert weight.item() == pytest.approx(want_weight, rel=1e-6)


def test_gradient_is_weighted_softmax_minus_one_hot():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets, weights = torch.tensor([1, -100, 3]), torch.tensor([0.5, 1.0, 2.0])
    (grad,) = torch.autograd.grad(cross_entropy(logits, targets, weights)[0], logits)
    want = logits.detach().softmax(-1)
    want[0, 1] -= 1
    want[2, 3] -= 1
    want *= torch.tensor([0.5, 0.0, 2.0])[:, None]
    torch.testing.assert_close(grad, want)


def test_no_targets_gives_zeros_not_nan():
    logits = torch.randn(3, 4, requires_grad=True)
    loss, weight = cross_entropy(logits, torch.full((3,), -100), None)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (loss.item(), weight.item()) == (0.0, 0.0)
    assert torch.equal(grad, torch.zeros(3, 4))


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(4096, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    targets = torch.randint(7, (4096,), generator=torch.Generator().manual_seed(3))
    loss, weight = cross_entropy(logits, targets, None)
    assert loss.dtype == weight.dtype == torch.float32
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert weight.item() == 4096


def test_other_ignore_index():
    loss, weight = cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]), None, ignore_index=0)
    assert (loss.item(), weight.item()) == (pytest.approx(math.log(4)), 1.0)
