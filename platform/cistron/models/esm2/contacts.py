"""Contacts from attention maps, without keeping the maps.

The published head is a logistic regression over the attention maps of all layers and heads, each symmetrised and then
corrected for background by subtracting r r' / sum(r), with r the sums of its rows (average product correction). Nearly
all of that is linear. The regression's weighted sum of the maps can be taken before they are made symmetric and cut to
residues, so a map is added up as soon as it exists; only r, one vector, is needed of each map by itself. Memory is that
of a few maps, where all of them would be hundreds.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from cistron.models.layers.buffers import Fp32Buffers

_MAP_ELEMENTS_ON_CPU: Final = 1 << 20
_MAP_ELEMENTS_ON_GPU: Final = 1 << 26
"""Entries of maps that exist at once, if one map has no more: what stays in a cache, and what fills a GPU."""

_TINY: Final = torch.finfo(torch.float32).tiny
"""Divisor of the background of a map without residues."""


class Regression(Fp32Buffers):
    """Weights of the logistic regression: buffers, because language modelling neither trains nor decays them."""

    def __init__(self, num_channels: int, *, device: str | torch.device | None) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.register_buffer("weight", torch.zeros(1, num_channels, device=device, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(1, device=device, dtype=torch.float32))


class ContactHead(nn.Module):
    """The contact head; all-zero weights mean that the checkpoint came without one."""

    def __init__(self, num_layers: int, num_heads: int, *, device: str | torch.device | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.regression = Regression(num_layers * num_heads, device=device)

    @property
    def fitted(self) -> bool:
        """Whether the regression has weights other than zero."""
        return bool(self.regression.weight.any())

    def share(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        residues: torch.Tensor,
        *,
        key_mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Return one layer's addend to the logits.

        Args:
            layer: index of the block; channels are in layer-major order.
            q: [B, A, L, D] queries.
            k: [B, A, L, D] keys.
            residues: [B, L] bool, false at <cls>, <eos> and padding.
            key_mask: [B, 1, 1, L] bool, false at padding; None without padding.
            scale: of the scores.

        Returns:
            [B, L, L] fp32, symmetric; zero outside of residues.
        """
        # A checkpoint may store the head in bf16 or fp16, and the maps are fp32.
        weights = self.regression.weight[0, layer * self.num_heads : (layer + 1) * self.num_heads].float()
        kept = residues.float()[:, None, :, None]
        total = torch.zeros(len(q), q.shape[2], q.shape[2], device=q.device)
        for part in torch.split(torch.arange(self.num_heads, device=q.device), _heads_at_once(q)):
            maps = _attention(q[:, part], k[:, part], key_mask, scale)
            sums = ((maps @ kept + maps.mT @ kept) * kept)[..., 0]
            shares = weights[part, None] * sums / sums.sum(dim=-1, keepdim=True).clamp_min(_TINY)
            total += torch.einsum("a,baij->bij", weights[part], maps)
            total -= torch.einsum("bai,baj->bij", shares, sums) / 2  # half, because the total is made symmetric
        return (total + total.mT) * kept[:, 0] * kept[:, 0].mT

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn the sum of all shares into contact probabilities."""
        return torch.sigmoid(logits + self.regression.bias.float())


def _heads_at_once(q: torch.Tensor) -> int:
    """Return how many heads' maps to make together, for queries [B, A, L, D]."""
    limit = _MAP_ELEMENTS_ON_CPU if q.device.type == "cpu" else _MAP_ELEMENTS_ON_GPU
    return max(1, limit // (len(q) * q.shape[2] ** 2))


def _attention(q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return attention probabilities [B, a, L, L], fp32."""
    scores = (q.float() * scale) @ k.float().mT
    if key_mask is not None:
        scores.masked_fill_(~key_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)
