"""How the tokens of a batch lie: padded rows, or documents packed end to end.

Everything that depends on that is worked out once per forward pass, here, and handed to each block: the blocks
themselves do not know which form they run.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cistron.errors import InputError


class Layout:
    """Where the tokens stand and who may attend to whom.

    A plain class on purpose: FSDP2's mixed precision casts the floating-point tensors among a block's arguments, also
    those inside dataclasses and containers, and the rotary frequencies must not be rounded to bf16.

    Args:
        positions: [L] or [T] int, position inside the sequence or document.
        inv_freq: [D/2] fp32 rotary frequencies.
        real: [B, L] bool, true at tokens that count, or None when all do.
        cu_seqlens: [N+1] int offsets of packed documents in host memory, or None for padded rows.
    """

    __slots__ = ("cu_seqlens", "inv_freq", "positions", "real")

    def __init__(
        self,
        *,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        real: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        self.positions = positions
        self.inv_freq = inv_freq
        self.real = real
        self.cu_seqlens = cu_seqlens

    @property
    def key_mask(self) -> torch.Tensor | None:
        """[B, 1, 1, L] bool for scaled dot-product attention: padding is never attended to."""
        return None if self.real is None else self.real[:, None, None, :]

    def document_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a [B, L] or [T] quantity over each sequence and hand the sum to each of its tokens.

        Returns:
            [B, 1] or [T], fp32: counts are exact.
        """
        if self.cu_seqlens is None:
            return values.float().sum(dim=-1, keepdim=True)
        offsets = self.cu_seqlens.to(values.device, torch.int64)
        running = functional.pad(values.to(torch.int64).cumsum(dim=0), (1, 0))[offsets]
        return running.diff().repeat_interleave(offsets.diff(), output_size=len(values)).float()


def padded_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, pad_id: int, inv_freq: torch.Tensor
) -> Layout:
    """Lay out padded rows [B, L]; without an attention mask, padding is where the pad id stands.

    Raises:
        InputError: wrong number of dimensions, no tokens, or a mask of another shape than the ids.
    """
    _check_ids(input_ids)
    if input_ids.dim() != 2 or not input_ids.numel():
        raise InputError(
            f"input_ids must be [B, L] with at least one token, or [T] together with cu_seqlens; "
            f"got shape {list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids has {list(input_ids.shape)}"
        )
    real = input_ids != pad_id if attention_mask is None else attention_mask.bool()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return Layout(positions=positions, inv_freq=inv_freq, real=real)


def packed_layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    inv_freq: torch.Tensor,
) -> Layout:
    """Lay out packed documents [T]; every token is real, whatever its id.

    Raises:
        InputError: wrong shapes, offsets that do not run from 0 to T, or an attention mask beside them.
    """
    _check_ids(input_ids)
    if attention_mask is not None:
        raise InputError("attention_mask does not apply to packed input: cu_seqlens already says what is real")
    if input_ids.dim() != 1 or not input_ids.numel():
        raise InputError(f"with cu_seqlens, input_ids must be [T] and not empty; got shape {list(input_ids.shape)}")
    offsets = cu_seqlens.to("cpu", torch.int64)
    if offsets.dim() != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(input_ids):
        raise InputError(f"cu_seqlens must run from 0 to {len(input_ids)}, the number of tokens; got {cu_seqlens}")
    if (lengths := offsets.diff()).min() < 0:
        raise InputError(f"cu_seqlens must not decrease; got {cu_seqlens}")
    starts = offsets[:-1].repeat_interleave(lengths)
    positions = (torch.arange(len(input_ids)) - starts).to(input_ids.device, non_blocking=True)
    return Layout(positions=positions, inv_freq=inv_freq, cu_seqlens=offsets)


def _check_ids(input_ids: torch.Tensor) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}")
