"""What the chunked scan multiplies by, made from poles and residues, and kept for a layer that only infers.

Shape legend: H channels, S poles of a channel, C tokens of a chunk, n chunks of a row, K = n.bit_length() levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from cistron_kernels.checks import can_look_at


class ScanMatrices(NamedTuple):
    """Their size does not depend on the sequence's.

    Attributes:
        toeplitz: [H, C, C], from a chunk's tokens (rows) to its outputs.
        to_state: [H, C, S], from a chunk's tokens to the state after it.
        from_state: [H, S, C], from the state before a chunk to its outputs.
        log_decay: [H, S], the logarithm of what a chunk leaves of the state before it.
        decays: [K or more, H, S], what 1, 2, 4, ... chunks leave of it, without gradient.
    """

    toeplitz: torch.Tensor
    to_state: torch.Tensor
    from_state: torch.Tensor
    log_decay: torch.Tensor
    decays: torch.Tensor


def scan_matrices(log_poles: torch.Tensor, residues: torch.Tensor, *, size: int, chunks: int) -> ScanMatrices:
    """Return the matrices of chunks of `size` tokens, in rows of `chunks`, for log poles and residues [H, S]."""
    # Powers as exp(k log pole): pole**k from a rounded pole loses two digits at 8k tokens and three at 131k.
    exponents = torch.arange(size + 1, device=log_poles.device, dtype=log_poles.dtype)
    powers = (log_poles[..., None] * exponents).exp()
    responses = residues[..., None] * powers
    log_decay = log_poles * size
    return ScanMatrices(
        _toeplitz(responses[..., :size].sum(1)),
        powers[..., :size].flip(-1).mT,
        responses[..., 1:],
        log_decay,
        level_decays(log_decay.detach(), chunks),
    )


def level_decays(log_decay: torch.Tensor, chunks: int) -> torch.Tensor:
    """Return [K, H, S], what 1, 2, 4, ... chunks leave of a state; all that a row of `chunks` needs."""
    levels = torch.arange(chunks.bit_length(), dtype=log_decay.dtype, device=log_decay.device)
    log_decays = levels.exp2()[:, None, None] * log_decay
    # What decays below the normal numbers is lost beside any update, and exp() takes four times as long to get there.
    return log_decays.clamp_(min=1 + math.log(torch.finfo(log_decay.dtype).tiny)).exp_()


def _toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """Return [H, C, C] with ``taps[j - i]`` at row i and column j, zero below the diagonal."""
    size = taps.shape[-1]
    return functional.pad(taps, (size - 1, 0)).unfold(-1, size, 1).flip(1)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Matrices, and the numbers that they were made from."""

    log_poles: torch.Tensor
    residues: torch.Tensor
    matrices: ScanMatrices

    def is_for(self, log_poles: torch.Tensor, residues: torch.Tensor, size: int, chunks: int) -> bool:
        """Compare the numbers themselves: a version counter does not see what is written past autograd."""
        return (
            self.matrices.toeplitz.shape[-1] == size
            and len(self.matrices.decays) >= chunks.bit_length()
            and _are_equal(self.log_poles, log_poles)
            and _are_equal(self.residues, residues)
        )


_KEPT: Final = WeakTensorKeyDictionary()
"""By the log poles' tensor, and as long as that lives."""


def kept_matrices(log_poles: torch.Tensor, residues: torch.Tensor, *, size: int, chunks: int) -> ScanMatrices | None:
    """Return what :func:`keep_matrices` kept, if the numbers are what they were and it serves so many chunks.

    Making the matrices is a tenth of the scan at 8,000 tokens, and more of it in shorter sequences.
    """
    kept: _Kept | None = _KEPT.get(log_poles)  # type: ignore[no-untyped-call]
    return kept.matrices if kept is not None and kept.is_for(log_poles, residues, size, chunks) else None


def keep_matrices(log_poles: torch.Tensor, residues: torch.Tensor, matrices: ScanMatrices) -> None:
    """Keep matrices without a gradient, until others are made from the same tensor of log poles."""
    _KEPT[log_poles] = _Kept(log_poles.clone(), residues.clone(), matrices)


def can_compare(*tensors: torch.Tensor) -> bool:
    """Return whether these are plain numbers in host memory."""
    return all(type(tensor) in (torch.Tensor, nn.Parameter) and can_look_at(tensor) for tensor in tensors)


def _are_equal(kept: torch.Tensor, given: torch.Tensor) -> bool:
    return kept.dtype == given.dtype and torch.equal(kept, given)
