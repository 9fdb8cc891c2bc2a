"""The transformer block of ESM-2: layer norm first, then attention or MLP, then the residual sum.

Module names are those of Hugging Face's ``EsmForMaskedLM``, so that the state dict is its checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn

from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.layout import Layout
from cistron.models.layers.dense_attention import dense_attention
from cistron.models.layers.linear import GeluLinear, Linear
from cistron_kernels.layer_norm import add_layer_norm, layer_norm
from cistron_kernels.rope import rotate_pair
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


class AddLayerNorm(LayerNorm):
    """The same norm behind a residual addition."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return the normalised sum of x and residual [..., H], and the sum."""
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps)


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
        self.scale = config.head_size**-0.5
        width = config.hidden_size
        self.query = Linear(width, width, device=device, dtype=dtype)
        self.key = Linear(width, width, device=device, dtype=dtype)
        self.value = Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Attend: [B, L, H] or [T, H] to the same shape."""
        q, k = self.query_key(x, layout)
        v = self._heads(self.value(x))
        if layout.cu_seqlens is not None:
            out = varlen_attention(q, k, v, layout.cu_seqlens, causal=False, scale=self.scale)
        else:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            out = dense_attention(q, k, v, attn_mask=layout.key_mask, scale=self.scale)
            out = out.transpose(1, 2)
        return out.flatten(-2)

    def query_key(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Project to rotated queries and keys [..., A, D]; scores are their products times ``scale``.

        The published model scales queries before it rotates them. A rotation is linear, so that is the same.
        """
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        return rotate_pair(q, k, *layout.rotation)

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
        self.output = Dense(Linear(config.hidden_size, config.hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return what attention adds to the residual stream [..., H]."""
        return self.output(self.self(self.LayerNorm(x), layout))


class Block(nn.Module):
    """One layer of ESM-2."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(config, device=device, dtype=dtype)
        self.LayerNorm = AddLayerNorm(config, device=device, dtype=dtype)
        width, inner = config.hidden_size, config.intermediate_size
        self.intermediate = Dense(GeluLinear(width, inner, device=device, dtype=dtype))
        self.output = Dense(Linear(inner, width, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Map the residual stream [B, L, H] or [T, H] to the next."""
        normalised, x = self.LayerNorm(self.attention(x, layout), x)
        return x + self.output(self.intermediate(normalised))

    def query_key(self, x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this block's rotated queries and keys [..., A, D] for the residual stream that enters it."""
        return self.attention.self.query_key(self.attention.LayerNorm(x), layout)
