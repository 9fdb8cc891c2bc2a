"""HCL's convolution on CPU: the chunked modal scan against the FFT, with and without building the long filter."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.timing import interleaved
from cistron_kernels.modal_scan import modal_scan

HIDDEN = 256
POLES = 16
LENGTHS = (8_192, 65_536)
TOLERANCE = 1e-4


def run() -> list[dict[str, Any]]:
    """Return one row per length; a wrong result is an error, not a row."""
    torch.set_num_threads(2)
    return [_compare(length) for length in LENGTHS]


@torch.inference_mode()
def _compare(length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x_BHL = torch.randn(1, HIDDEN, length, generator=generator)
    log_poles_HS = -torch.rand(HIDDEN, POLES, generator=generator).mul(8).sub(8).exp()
    residues_HS = torch.randn(HIDDEN, POLES, generator=generator) / POLES
    spectrum = _spectrum(log_poles_HS, residues_HS, length)
    scanned, _ = modal_scan(x_BHL, log_poles_HS, residues_HS)
    error = (scanned - _fft(x_BHL, spectrum)).norm() / scanned.norm()
    if error > TOLERANCE:
        raise AssertionError(f"the scan differs from the FFT by {error:.1e} at length {length}: no speed is reported")
    seconds = interleaved(
        {
            "scan": lambda: modal_scan(x_BHL, log_poles_HS, residues_HS),
            "fft_cached": lambda: _fft(x_BHL, spectrum),
            "fft_built": lambda: _fft(x_BHL, _spectrum(log_poles_HS, residues_HS, length)),
        }
    )
    return {
        "length": length,
        "scan_ms": round(1000 * seconds["scan"], 1),
        "faster_than_fft_with_built_filter": round(seconds["fft_built"] / seconds["scan"], 2),
        "faster_than_fft_with_cached_filter": round(seconds["fft_cached"] / seconds["scan"], 2),
        "relative_difference": float(f"{error:.1e}"),
    }


def _spectrum(log_poles_HS: torch.Tensor, residues_HS: torch.Tensor, length: int) -> torch.Tensor:
    """Build the filter as the published inference code does: every pole's powers, then their sum."""
    powers_HSL = (log_poles_HS[..., None] * torch.arange(length)).exp()
    return torch.fft.rfft((residues_HS[..., None] * powers_HSL).sum(1), 2 * length)


def _fft(x_BHL: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    length = x_BHL.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x_BHL, 2 * length) * spectrum, 2 * length)[..., :length]
