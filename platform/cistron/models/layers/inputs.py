"""What may enter a model: token ids as padded rows or as packed documents, checked before anything is computed."""

from __future__ import annotations

import torch

from cistron.errors import InputError


def check_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Check padded rows [B, L] and their mask.

    Raises:
        InputError: no integer ids, wrong number of dimensions, no tokens, or a mask of another shape.
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


def packed_offsets(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check packed documents [T]; return their offsets [N+1] and every token's position in its document [T].

    Both are int64 on the host, where the loops over documents run.

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
    lengths = offsets.diff()
    if lengths.min() < 0:
        raise InputError(f"cu_seqlens must not decrease; got {cu_seqlens}")
    return offsets, torch.arange(len(input_ids)) - offsets[:-1].repeat_interleave(lengths)


def _check_ids(input_ids: torch.Tensor) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}")
