"""How the tokens of a batch lie: padded rows, or documents packed end to end.

Everything that depends on that is worked out once per forward pass, here, and handed to each block: the blocks
themselves do not know which form they run.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from cistron.models.layers.inputs import check_rows, packed_offsets
from cistron.tokenizers import ProteinTokenizer
from cistron_kernels.rope import rotation


class Layout:
    """Where the tokens stand and who may attend to whom.

    A plain class on purpose: FSDP2's mixed precision casts the floating-point tensors among a block's arguments, also
    those inside dataclasses and containers, and the rotary angles must not be rounded to bf16.

    Args:
        rotation: cosines and sines of the rotary angles of all positions, each [L, 1, D/2] or [T, 1, D/2] fp32.
        real: [B, L] bool, true at tokens that count, or None when all do.
        cu_seqlens: [N+1] int offsets of packed documents in host memory, or None for padded rows.
    """

    __slots__ = ("cu_seqlens", "key_mask", "real", "rotation")

    def __init__(
        self,
        *,
        rotation: tuple[torch.Tensor, torch.Tensor],
        real: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        self.rotation = rotation
        self.real = real
        self.cu_seqlens = cu_seqlens
        self.key_mask = None if real is None else _key_mask(real)

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
        InputError: wrong number of dimensions, no tokens, an id outside the vocabulary, or a mask of another shape
            than the ids.
    """
    check_rows(input_ids, attention_mask, vocab_size=ProteinTokenizer.vocab_size)
    real = input_ids != pad_id if attention_mask is None else attention_mask.bool()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return Layout(rotation=rotation(positions, inv_freq), real=real)


def packed_layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    inv_freq: torch.Tensor,
) -> Layout:
    """Lay out packed documents [T]; every token is real, whatever its id.

    Raises:
        InputError: wrong shapes, an id outside the vocabulary, offsets that do not run from 0 to T, or an attention
            mask beside them.
    """
    offsets, positions = packed_offsets(input_ids, attention_mask, cu_seqlens, vocab_size=ProteinTokenizer.vocab_size)
    positions = positions.to(input_ids.device, non_blocking=True)
    return Layout(rotation=rotation(positions, inv_freq), cu_seqlens=offsets)


def _key_mask(real: torch.Tensor) -> torch.Tensor | None:
    """Return [B, 1, 1, L] bool for scaled dot-product attention: padding is never attended to.

    In host memory, where looking costs no synchronisation, rows without padding get no mask: attention is faster then.
    """
    return None if real.device.type == "cpu" and bool(real.all()) else real[:, None, None, :]
