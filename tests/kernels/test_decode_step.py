from __future__ import annotations

import pytest
import torch

from cistron_kernels.decode_step import fir_step, modal_step
from cistron_kernels.hyena_fir import TapOrder, hyena_fir
from cistron_kernels.modal_scan import modal_scan


@pytest.mark.parametrize("order", ["correlation", "impulse"])
@pytest.mark.parametrize(("groups", "width", "skips"), [(6, 3, 0), (2, 7, 2), (2, 128, 6)])
def test_fir_steps_equal_the_filter_from_the_first_token_on(order: TapOrder, groups: int, width: int, skips: int):
    torch.manual_seed(0)
    x, taps = torch.randn(3, 6, 11, dtype=torch.float64), torch.randn(groups, width, dtype=torch.float64)
    skip = torch.randn(skips, dtype=torch.float64) if skips else None
    expected, last = hyena_fir(x, taps, order=order, skip=skip)
    history = x.new_zeros(3, width - 1 + x.shape[-1], 6)
    for t in range(x.shape[-1]):
        y = fir_step(x[..., t], taps, history, width - 1 + t, order=order, skip=skip)
        torch.testing.assert_close(y, expected[..., t])
    assert torch.equal(history[:, x.shape[-1] :].transpose(1, 2), last)


def test_modal_steps_equal_the_scan():
    torch.manual_seed(1)
    x, log_poles = torch.randn(2, 3, 9, dtype=torch.float64), -torch.rand(3, 4, dtype=torch.float64)
    residues = torch.randn(3, 4, dtype=torch.float64)
    expected, last = modal_scan(x, log_poles, residues)
    state = x.new_zeros(2, 3, 4)
    for t in range(x.shape[-1]):
        y = modal_step(x[..., t], log_poles, residues, state)
        torch.testing.assert_close(y, expected[..., t])
    torch.testing.assert_close(state, last)


def test_slow_poles_stay_exact_over_many_steps_in_fp32():
    torch.manual_seed(2)
    x, residues = torch.randn(1, 8, 4000), torch.randn(8, 16) / 16
    log_poles = -torch.rand(8, 16).mul(8).sub(10).exp()
    wide, state = torch.zeros(1, 8, 16, dtype=torch.float64), torch.zeros(1, 8, 16)
    for t in range(x.shape[-1]):
        wide = log_poles.double().exp() * wide + x[..., t, None]
        y = modal_step(x[..., t], log_poles, residues, state)
    assert (y - (wide * residues).sum(-1)).abs().max() < 1e-5
    assert (state - wide).abs().max() < 2e-6 * wide.abs().max()


def test_dtypes_follow_the_input_and_the_state_stays_fp32():
    x, taps = torch.randn(1, 4).bfloat16(), torch.randn(2, 3).bfloat16()
    y = fir_step(x, taps, torch.zeros(1, 3, 4, dtype=torch.bfloat16), 2, order="impulse")
    assert y.dtype == torch.bfloat16
    state = torch.zeros(1, 4, 2)
    y = modal_step(x, -torch.rand(4, 2), torch.randn(4, 2), state)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
