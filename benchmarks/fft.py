"""The long convolution as the published code runs it: the filter's powers written out, and a product of spectra."""

from __future__ import annotations

import torch


def long_filters(log_poles_HS: torch.Tensor, residues_HS: torch.Tensor, length: int) -> torch.Tensor:
    """Build the filters [H, L] as the published inference code does: every pole's powers, then their sum."""
    powers_HSL = (log_poles_HS[..., None] * torch.arange(length)).exp()
    return (residues_HS[..., None] * powers_HSL).sum(1)


def convolved(x_BHL: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """Convolve causally with the filters of which `spectrum` is the real FFT over 2 L tokens."""
    length = x_BHL.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x_BHL, 2 * length) * spectrum, 2 * length)[..., :length]
