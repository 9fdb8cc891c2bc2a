"""HCL's convolution with a sum of decaying exponentials, by chunks: linear in L, and no filter of length L is built.

Shape legend: B batch, H channels, L length, S poles of a channel, C tokens of a chunk, n chunks of a row.
"""

from __future__ import annotations

import torch

from cistron_kernels.modal_scan.chunks import ChunkedScan, scan_chunks
from cistron_kernels.modal_scan.matrices import can_compare, keep_matrices, kept_matrices, scan_matrices


def modal_scan(
    x: torch.Tensor,
    log_poles: torch.Tensor,
    residues: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    chunk: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [B, H, L] and the final state [B, H, S], as the package's function of this name says."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(x.dtype, log_poles.dtype), torch.float32)
        log_poles, residues = log_poles.to(wide), residues.to(wide)
        batch, channels, length = x.shape
        size = min(chunk, length)
        initial = x.new_zeros(batch, channels, log_poles.shape[1], dtype=wide) if state is None else state.to(wide)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, log_poles, residues, initial))
        # One prompt shorter than a chunk has matrices of its own, and does not take the place of the layer's.
        keeps = not learns and length >= chunk and can_compare(x, log_poles, residues)
        sizes = {"size": size, "chunks": -(-length // size)}
        kept = kept_matrices(log_poles, residues, **sizes) if keeps else None
        matrices = kept or scan_matrices(log_poles, residues, **sizes)
        whole = length // size if lengths is None else lengths // size
        initial = initial.transpose(0, 1)
        if learns or torch.compiler.is_compiling():
            y, reached = ChunkedScan.apply(x, initial, whole, *matrices)  # type: ignore[no-untyped-call]
        else:
            y, reached = scan_chunks(x, matrices, initial, whole)
        if keeps and kept is None:
            keep_matrices(log_poles, residues, matrices)
        y = y.flatten(2).transpose(0, 1)[..., :length].to(x.dtype)
        return y, _final_state(x, reached.transpose(0, 1), log_poles, matrices.to_state, lengths)


def _final_state(
    x: torch.Tensor,
    reached: torch.Tensor,
    log_poles: torch.Tensor,
    to_state: torch.Tensor,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Return [B, H, S]: the state before each row's unfinished chunk, moved on by the real tokens of that chunk."""
    (_, channels, length), size = x.shape, to_state.shape[1]
    rest: int | torch.Tensor
    if lengths is None:
        rest = length % size
        if rest == 0:
            return reached
        tail, to_state = x[..., length - rest :], to_state[:, size - rest :]
    else:
        rest = (lengths % size)[:, None, None]
        # Right-aligned at the row's end, the unfinished chunks of all rows meet the same powers.
        ahead = torch.arange(size, 0, -1, device=x.device)
        index = (lengths[:, None] - ahead).clamp(min=0)
        tail = torch.where(ahead <= rest, x.gather(-1, index[:, None].expand(-1, channels, -1)), 0.0)
    decayed = reached * (log_poles * rest).exp()
    return decayed + torch.einsum("bhc,hcs->bhs", tail.to(to_state.dtype), to_state)
