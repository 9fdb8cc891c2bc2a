"""HCL's convolution on CPU: the chunked modal scan against the FFT, with and without building the long filter.

Each length is measured in new processes, the short one in five, whose medians are shown: some with the C library's
default allocator, which returns tensors above 32 MiB to the system after every call, and some whose allocator keeps
freed memory for the next call. New memory costs the FFT more than its arithmetic does, so the second compares the
arithmetic alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fft import convolved, long_filters
from benchmarks.memory import peak, resident
from benchmarks.timing import KEEP_FREED_MEMORY, in_new_process, interleaved
from cistron_kernels.modal_scan import modal_scan

HIDDEN = 256
POLES = 16
SHORT, LONG = 8_192, 65_536
CALLS = 5
ROUNDS = {SHORT: 15, LONG: 5}
PROCESSES = {SHORT: 5, LONG: 1}
"""How a process' short tensors happen to lie decides whether the FFT gets new memory in each call or never."""
TOLERANCE = 1e-6
ASKED = {
    ("faster than FFT, filter built", SHORT): ">= 25",
    ("faster than FFT, filter built", LONG): ">= 25",
    ("faster than FFT, filter cached", SHORT): ">= 2.2",
    ("faster than FFT, filter cached", LONG): ">= 3",
    ("time, 64k / 8k", LONG): "<= 8.8",
    ("peak extra memory, 64k / 8k", LONG): "<= 8.8",
}


def run() -> list[dict[str, Any]]:
    """Return one row per measure and length; a wrong result is an error, not a row."""
    kept, default = ({n: _medians(n, environment) for n in (SHORT, LONG)} for environment in (KEEP_FREED_MEMORY, {}))
    for measured, environment in ((kept, KEEP_FREED_MEMORY), (default, {})):
        measured[LONG] |= in_new_process(_growth, LONG, environment=environment)
        grown, start = (measured[n]["peak extra memory, MiB"] for n in (LONG, SHORT))
        measured[LONG]["peak extra memory, 64k / 8k"] = round(grown / start, 2)
    return [
        {
            "measure": name,
            "length": length,
            "asked": ASKED.get((name, length), ""),
            "measured": default[length][name],
            "measured_memory_kept": kept[length][name],
        }
        for length in (SHORT, LONG)
        for name in kept[length]
    ]


def _medians(length: int, environment: dict[str, str]) -> dict[str, float]:
    """Return the median of each measure over several processes."""
    runs = [in_new_process(_measure, length, environment=environment) for _ in range(PROCESSES[length])]
    return {name: statistics.median_low(run[name] for run in runs) for name in runs[0]}


def _draw(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BHL = torch.randn(1, HIDDEN, length, generator=generator)
    log_poles_HS = -torch.rand(HIDDEN, POLES, generator=generator).mul(8).sub(8).exp()
    return x_BHL, log_poles_HS, torch.randn(HIDDEN, POLES, generator=generator) / POLES


@torch.no_grad()
def _growth(length: int) -> dict[str, float]:
    """Compare with SHORT in one process, in turns: processes apart would compare one minute's noise with another's.

    As many tokens are scanned in either turn and all outputs are kept until its end. Otherwise the short ones would
    share one memory, and the long one would be compared with the price of new pages.
    """
    torch.set_num_threads(2)
    short, long = _draw(SHORT), _draw(length)
    calls = length // SHORT
    seconds = interleaved(
        {"short": lambda: [modal_scan(*short) for _ in range(calls)], "long": lambda: modal_scan(*long)}
    )
    return {"time, 64k / 8k": round(calls * seconds["long"] / seconds["short"], 2)}


def _measure(length: int) -> dict[str, float]:
    torch.set_num_threads(2)
    inputs = _, log_poles_HS, residues_HS = _draw(length)
    with torch.no_grad():
        memory = _memory(*inputs)
        filters_HL = long_filters(log_poles_HS, residues_HS, length)
        forward = _forward(*inputs, filters_HL)
    return forward | memory | _forward_and_backward(*inputs, filters_HL)


def _memory(x_BHL: torch.Tensor, log_poles_HS: torch.Tensor, residues_HS: torch.Tensor) -> dict[str, float]:
    modal_scan(x_BHL[..., :64], log_poles_HS, residues_HS)  # Whatever libraries load on their first call.
    peak = _peak_extra_mib(lambda: modal_scan(x_BHL, log_poles_HS, residues_HS))
    return {
        "peak extra memory, MiB": round(peak, 1),
        "peak extra memory, bytes per token and channel": round(peak * 2**20 / x_BHL.numel(), 1),
    }


def _forward(
    x_BHL: torch.Tensor, log_poles_HS: torch.Tensor, residues_HS: torch.Tensor, filters_HL: torch.Tensor
) -> dict[str, float]:
    length = x_BHL.shape[-1]
    spectrum = torch.fft.rfft(filters_HL, 2 * length)

    def scan() -> torch.Tensor:
        return modal_scan(x_BHL, log_poles_HS, residues_HS)[0]

    def build_and_convolve() -> torch.Tensor:
        return convolved(x_BHL, torch.fft.rfft(long_filters(log_poles_HS, residues_HS, length), 2 * length))

    scanned = scan()
    error = ((scanned - convolved(x_BHL, spectrum)).norm() / scanned.norm()).item()
    if error > TOLERANCE:
        raise AssertionError(f"the scan differs from the FFT by {error:.1e} at length {length}: no speed is reported")
    cached = interleaved(
        {"scan": _in_a_row(scan), "fft": _in_a_row(lambda: convolved(x_BHL, spectrum))}, rounds=ROUNDS[length]
    )
    built = interleaved({"scan": _in_a_row(scan), "fft": build_and_convolve})
    return {
        "time, ms": round(1000 * cached["scan"] / CALLS, 1),
        "faster than FFT, filter built": round(built["fft"] / built["scan"] * CALLS, 1),
        "faster than FFT, filter cached": round(cached["fft"] / cached["scan"], 2),
        "relative difference from the FFT": float(f"{error:.1e}"),
    }


def _forward_and_backward(
    x_BHL: torch.Tensor, log_poles_HS: torch.Tensor, residues_HS: torch.Tensor, filters_HL: torch.Tensor
) -> dict[str, float]:
    """Compare with an FFT that is given the filter and stops at its gradient, short of the poles."""
    length = x_BHL.shape[-1]
    upstream = torch.ones_like(x_BHL)

    def scan() -> None:
        inputs = [tensor.detach().requires_grad_() for tensor in (x_BHL, log_poles_HS, residues_HS)]
        modal_scan(*inputs)[0].backward(upstream)

    def fft() -> None:
        x, filters = (tensor.detach().requires_grad_() for tensor in (x_BHL, filters_HL))
        convolved(x, torch.fft.rfft(filters, 2 * length)).backward(upstream)

    seconds = interleaved({"scan": scan, "fft": fft}, rounds=5)
    return {
        "forward and backward, ms": round(1000 * seconds["scan"], 1),
        "forward and backward, faster than FFT, filter given": round(seconds["fft"] / seconds["scan"], 2),
    }


def _in_a_row(function: Callable[[], object], calls: int = CALLS) -> Callable[[], None]:
    """Let a turn be several calls, so that few of them pay for the caches that the other candidate emptied."""

    def run() -> None:
        for _ in range(calls):
            function()

    return run


def _peak_extra_mib(function: Callable[[], object]) -> float:
    """Return how far the resident memory rises above what is in use before the call."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
    before = resident()
    function()
    return (peak() - before) / 2**20
