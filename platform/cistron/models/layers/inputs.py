"""What may enter a model: token ids as padded rows or as packed documents, checked before anything is computed."""

from __future__ import annotations

import torch

from cistron.errors import InputError


def check_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, vocab_size: int) -> None:
    """Check padded rows [B, L] and their mask, and, in host memory, that ids are below `vocab_size`.

    Raises:
        InputError: no integer ids, wrong number of dimensions, no tokens, an id outside the vocabulary, or a mask of
            another shape.
    """
    _check_ids(input_ids, vocab_size)
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
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check packed documents [T]; return their offsets [N+1] and every token's position in its document [T].

    Both are int64 on the host, where the loops over documents run. Ids are checked as by :func:`check_rows`.

    Raises:
        InputError: wrong shapes, an id outside the vocabulary, offsets that do not run from 0 to T, or an attention
            mask beside them.
    """
    _check_ids(input_ids, vocab_size)
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


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must be int64 or int32 token ids, got {input_ids.dtype}")
    # On a GPU, looking would make the CPU wait at every pass; there the embedding's own assertion stops a bad id.
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise InputError(f"input_ids: {outside} is outside the vocabulary, ids 0 to {vocab_size - 1}")
