"""Evo 2's attention: causal, with rotary positions whose frequencies are stored and not computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from cistron.models.evo2.cache import AttentionState
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.layout import Layout
from cistron.models.layers.buffers import Fp32Buffers
from cistron.models.layers.dense_attention import dense_attention
from cistron.models.layers.linear import Linear
from cistron_kernels.rope import rope_pair
from cistron_kernels.varlen_attention import varlen_attention

_QUERY_BLOCK: Final = 1024
"""Queries that attend together on the CPU: enough for the kernel, few enough that it skips most of their future."""


class Rotary(Fp32Buffers):
    """The rotary frequencies: published checkpoints hold values rounded to bf16, which must not be made exact."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        self.scaling = config.rotary_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", torch.empty(config.head_size // 2, dtype=torch.float32))

    def forward(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys [..., L, A, D] to `positions` [..., L]."""
        return rope_pair(q, k, positions, self.inv_freq, scaling=self.scaling)


class Attention(nn.Module):
    """Multi-head attention; the rows of ``qkv`` are all queries, then all keys, then all values."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.qkv = Linear(width, 3 * width, bias=False)
        self.output = Linear(width, width, bias=config.attention_output_bias)
        self.rotary = Rotary(config)

    def forward(self, x: torch.Tensor, layout: Layout, state: AttentionState | None = None) -> torch.Tensor:
        """Attend: [B, L, H] or [T, H] to the same shape; `state` is updated in place."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_size)).unbind(dim=-3)
        q, k = self.rotary(q, k, layout.positions)
        scale = self.head_size**-0.5
        if layout.cu_seqlens is not None:
            out = varlen_attention(q, k, v, layout.cu_seqlens, causal=True, scale=scale)
            return self.output(out.flatten(-2))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if state is None or not any(state.lengths):
            if state is not None:
                state.append(k, v, layout.lengths)
            out = dense_attention(q, k, v, is_causal=True, scale=scale)
        else:
            starts = state.lengths
            keys, values = (stored.to(q.dtype) for stored in state.append(k, v, layout.lengths))
            out = attend_to_past(q, keys, values, starts, scale=scale)
        return self.output(out.transpose(1, 2).flatten(-2))


def attend_to_past(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: Sequence[int], *, scale: float
) -> torch.Tensor:
    """Attend from tokens that continue rows to all before them in their row, and causally to each other.

    Temporary memory does not grow with the number of keys times the number of queries.

    Args:
        q: [B, A, L, D] queries of the next L tokens of each row.
        keys: [B, A, max(starts) + L, D]; row b's are filled up to starts[b] + L.
        values: [B, A, max(starts) + L, D].
        starts: tokens that each row has read before.
        scale: factor of the scores before the softmax.

    Returns:
        [B, A, L, D].
    """
    length = q.shape[2]
    if len(set(starts)) == 1:
        return _attend_at_end(q, keys, values, scale=scale)
    if length == 1:
        own = torch.tensor(starts, device=q.device)[:, None]
        visible = torch.arange(keys.shape[2], device=q.device) <= own
        return dense_attention(q, keys, values, attn_mask=visible[:, None, None], scale=scale)
    rows = []
    for row, start in enumerate(starts):
        one, seen = slice(row, row + 1), slice(0, start + length)
        rows.append(_attend_at_end(q[one], keys[one, :, seen], values[one, :, seen], scale=scale))
    return torch.cat(rows)


def _attend_at_end(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attend with queries [B, A, L, D] of the last L of T tokens, whose keys and values are [B, A, T, D]."""
    length, total = q.shape[2], keys.shape[2]
    if length == 1:
        return dense_attention(q, keys, values, scale=scale)
    if q.device.type != "cpu":
        # Imported here because it brings torch's compiler along: seconds that a machine without a GPU never needs.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(length, total)
        return dense_attention(q, keys, values, attn_mask=mask, scale=scale)
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        block = q[:, :, start : start + _QUERY_BLOCK]
        visible = total - length + start + block.shape[2]
        blocks.append(_attend_reversed(block, keys[:, :, :visible], values[:, :, :visible], scale=scale))
    return torch.cat(blocks, dim=2)


def _attend_reversed(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attend as :func:`_attend_at_end`, with a mask of L + T numbers instead of L x T.

    With the last query first, query i sees key j if i + j < T. An entry depends on i + j alone, so the mask is a view
    of a vector in which both strides are 1.
    """
    length, total = q.shape[2], keys.shape[2]
    vector = q.new_zeros(length + total - 1)
    vector[total:] = -torch.inf
    mask = vector.as_strided((length, total), (1, 1))
    return dense_attention(q.flip(2), keys, values, attn_mask=mask, scale=scale).flip(2)


def empty_state(config: Evo2Config, batch_size: int, like: torch.Tensor, *, reserve: int = 0) -> AttentionState:
    """Return the state before the first token, with room for `reserve` tokens; `like` gives device and dtype."""
    shape = (batch_size, config.num_attention_heads, reserve, config.head_size)
    return AttentionState(keys=like.new_zeros(shape), values=like.new_zeros(shape), lengths=(0,) * batch_size)
