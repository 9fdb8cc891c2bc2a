"""Evo 2's attention: causal, with rotary positions whose frequencies are stored and not computed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from cistron.models.evo2.cache import AttentionState
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.layout import Layout
from cistron.models.layers.buffers import Fp32Buffers
from cistron_kernels.rope import rope
from cistron_kernels.varlen_attention import varlen_attention


class Rotary(Fp32Buffers):
    """The rotary frequencies: published checkpoints hold values rounded to bf16, which must not be made exact."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        self.scaling = config.rotary_scaling
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", torch.empty(config.head_size // 2, dtype=torch.float32))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate [..., L, A, D] to `positions` [..., L]."""
        return rope(x, positions, self.inv_freq, scaling=self.scaling)


class Attention(nn.Module):
    """Multi-head attention; the rows of ``qkv`` are all queries, then all keys, then all values."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.head_size = config.num_attention_heads, config.head_size
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=config.attention_output_bias)
        self.rotary = Rotary(config)

    def forward(self, x: torch.Tensor, layout: Layout, state: AttentionState | None = None) -> torch.Tensor:
        """Attend: [B, L, H] or [T, H] to the same shape; `state` is updated in place."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_size)).unbind(dim=-3)
        q, k = self.rotary(q, layout.positions), self.rotary(k, layout.positions)
        scale = self.head_size**-0.5
        if layout.cu_seqlens is not None:
            out = varlen_attention(q, k, v, layout.cu_seqlens, causal=True, scale=scale)
        elif state is None or state.used == 0:
            if state is not None:
                state.append(k, v, layout.positions)
            out = _attention(q, k, v, mask=None, scale=scale)
        else:
            keys, values = state.append(k, v, layout.positions)
            visible = torch.arange(state.used, device=x.device) <= layout.positions[..., None]
            out = _attention(q, keys.to(q.dtype), values.to(q.dtype), mask=visible[:, None], scale=scale)
        return self.output(out.flatten(-2))


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attend with [B, L, A, D] tensors, causally unless a mask says what is visible."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def empty_state(config: Evo2Config, batch_size: int, like: torch.Tensor) -> AttentionState:
    """Return the state before the first token; `like` gives device and dtype."""
    empty = like.new_zeros(batch_size, 0, config.num_attention_heads, config.head_size)
    return AttentionState(keys=empty, values=empty)
