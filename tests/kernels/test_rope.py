import cmath
import math

import pytest
import torch

from cistron_kernels.rope import rope, rotate, rotation


def rotated_pairs(x, position, inv_freq, scaling):
    """Each pair as a complex number, turned by multiplication, in double precision."""
    half = len(x) // 2
    pairs = [complex(x[i], x[i + half]) * cmath.exp(1j * position / scaling * inv_freq[i]) for i in range(half)]
    return [p.real for p in pairs] + [p.imag for p in pairs]


@pytest.mark.parametrize("scaling", [1.0, 16.0])
def test_equals_complex_rotation(scaling):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator)
    positions = torch.tensor([0, 1, 7, 0, 1023])
    inv_freq = 10_000.0 ** -(torch.arange(4) / 4)
    got = rope(x, positions, inv_freq, scaling=scaling)
    for token, position in enumerate(positions.tolist()):
        for head in range(3):
            want = rotated_pairs(x[token, head].tolist(), position, inv_freq.tolist(), scaling)
            torch.testing.assert_close(got[token, head], torch.tensor(want), atol=2e-4, rtol=0)


def test_positions_broadcast_over_the_batch():
    x = torch.randn(2, 6, 1, 4, generator=torch.Generator().manual_seed(1))
    inv_freq = torch.tensor([1.0, 0.1])
    shared = rope(x, torch.arange(6), inv_freq)
    per_row = rope(x, torch.arange(6).expand(2, 6), inv_freq)
    assert torch.equal(shared, per_row)
    assert torch.equal(shared[1], rope(x[1], torch.arange(6), inv_freq))


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 1, 8, generator=generator), torch.randn(1, 1, 8, generator=generator)
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03])

    def score(p, r):
        return (rope(q, torch.tensor([p]), inv_freq) * rope(k, torch.tensor([r]), inv_freq)).sum().item()

    assert math.isclose(score(3, 10), score(103, 110), abs_tol=1e-4)
    assert not math.isclose(score(3, 10), score(3, 11), abs_tol=1e-2)


def test_bf16_input_keeps_fp32_angles():
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(3))
    inv_freq = 10_000.0 ** -(torch.arange(8) / 8)
    position = torch.tensor([4_001])
    got = rope(x.bfloat16(), position, inv_freq)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rope(x, position, inv_freq), atol=0.03, rtol=0)


def test_gradient():
    x = torch.randn(3, 2, 4, dtype=torch.float32, requires_grad=True)
    out = rope(x, torch.tensor([0, 5, 9]), torch.tensor([1.0, 0.1]))
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    inverse = rope(upstream, -torch.tensor([0, 5, 9]), torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(grad, inverse)


def test_shared_rotation_is_that_of_each_layer():
    generator = torch.Generator().manual_seed(4)
    inv_freq, positions = torch.tensor([1.0, 0.2, 0.04]), torch.tensor([[0, 1, 2], [5, 6, 0]])
    shared = rotation(positions, inv_freq, scaling=2.0)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 6, generator=generator)
        assert torch.equal(rotate(x, *shared), rope(x, positions, inv_freq, scaling=2.0))
