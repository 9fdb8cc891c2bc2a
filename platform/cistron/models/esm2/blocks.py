"""The transformer block of ESM-2: layer norm first, then attention or MLP, then the residual sum.

Module names are those of Hugging Face's ``EsmForMaskedLM``, so that the state dict is its checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.layout import Layout
from cistron_kernels.bias_gelu import bias_gelu
from cistron_kernels.layer_norm import layer_norm
from cistron_kernels.rope import rope
from cistron_kernels.varlen_attention import varlen_attention


class LayerNorm(nn.Module):
    """Layer norm over the hidden dimension."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class GeluLinear(nn.Linear):
    """A linear layer followed by GELU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class names it so
        """Map [..., inputs] to [..., outputs]."""
        return bias_gelu(functional.linear(input, self.weight), self.bias)


class Dense(nn.Module):
    """A layer under the name ``dense``."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.dense = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return self.dense(x)


class SelfAttention(nn.Module):
    """Projections to heads and attention between the tokens of one sequence."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.head_size = config.head_size
        width = config.hidden_size
        self.query = nn.Linear(width, width, device=device, dtype=dtype)
        self.key = nn.Linear(width, width, device=device, dtype=dtype)
        self.value = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Attend: [B, L, H] or [T, H] to the same shape."""
        q, k = self._query_key(x, layout)
        v = self._heads(self.value(x))
        if layout.cu_seqlens is not None:
            out = varlen_attention(q, k, v, layout.cu_seqlens, causal=False, scale=1.0)
        else:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.key_mask, scale=1.0)
            out = out.transpose(1, 2)
        return out.flatten(-2)

    def maps(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the attention probabilities [B, A, L, L] of padded input, fp32."""
        q, k = (tensor.transpose(1, 2).float() for tensor in self._query_key(x, layout))
        scores = q @ k.transpose(-1, -2)
        if layout.key_mask is not None:
            scores = scores.masked_fill(~layout.key_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def _query_key(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Project to queries, scaled as the published model does before rotating them, and keys: [..., A, D]."""
        q = self._heads(self.query(x) * self.head_size**-0.5)
        k = self._heads(self.key(x))
        return rope(q, layout.positions, layout.inv_freq), rope(k, layout.positions, layout.inv_freq)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size)


class Attention(nn.Module):
    """The attention half of a block."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.LayerNorm = LayerNorm(config, device=device, dtype=dtype)
        self.self = SelfAttention(config, device=device, dtype=dtype)
        self.output = Dense(nn.Linear(config.hidden_size, config.hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Add attention to the residual stream [..., H]."""
        return x + self.output(self.self(self.LayerNorm(x), layout))


class Block(nn.Module):
    """One layer of ESM-2."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, device=device, dtype=dtype)
        self.LayerNorm = LayerNorm(config, device=device, dtype=dtype)
        width, inner = config.hidden_size, config.intermediate_size
        self.intermediate = Dense(GeluLinear(width, inner, device=device, dtype=dtype))
        self.output = Dense(nn.Linear(inner, width, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Map the residual stream [B, L, H] or [T, H] to the next."""
        x = self.attention(x, layout)
        return x + self.output(self.intermediate(self.LayerNorm(x)))

    def attention_maps(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return this block's attention probabilities [B, A, L, L] for the residual stream that enters it, fp32."""
        return self.attention.self.maps(self.attention.LayerNorm(x), layout)
