"""Contacts from attention maps, one layer at a time.

The published head is a logistic regression over the symmetrised, background-corrected attention maps of all layers and
heads. Correction works per map and the regression is linear, so each layer's share can be added up as soon as its maps
exist: memory is that of one layer's maps, instead of those of all of them.
"""

from __future__ import annotations

import torch
from torch import nn

from cistron.models.layers.buffers import Fp32Buffers


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

    def share(self, layer: int, maps: torch.Tensor) -> torch.Tensor:
        """Return one layer's addend to the logits.

        Args:
            layer: index of the block; channels are in layer-major order.
            maps: [B, A, L', L'] attention between residues, zero at padding.

        Returns:
            [B, L', L'] fp32.
        """
        weights = self.regression.weight[0, layer * self.num_heads : (layer + 1) * self.num_heads]
        return torch.einsum("a,baij->bij", weights, correct_background(maps + maps.transpose(-1, -2)))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn the sum of all shares into contact probabilities."""
        return torch.sigmoid(logits + self.regression.bias)


def correct_background(maps: torch.Tensor) -> torch.Tensor:
    """Subtract from each entry the product of its row and column sums over the total (average product correction).

    Args:
        maps: [..., L, L], symmetric and non-negative.
    """
    rows, columns = maps.sum(dim=-1, keepdim=True), maps.sum(dim=-2, keepdim=True)
    total = maps.sum(dim=(-1, -2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps - rows * columns / total


def residue_maps(maps: torch.Tensor, input_ids: torch.Tensor, real: torch.Tensor, *, eos_id: int) -> torch.Tensor:
    """Cut attention maps down to residues.

    Rows and columns of padding and <eos> become zero, then the first (<cls>) and the last row and column go.

    Args:
        maps: [B, A, L, L].
        input_ids: [B, L].
        real: [B, L] bool.
        eos_id: id of <eos>.

    Returns:
        [B, A, L - 2, L - 2].
    """
    kept = (real & (input_ids != eos_id)).to(maps.dtype)
    maps = maps * kept[:, None, :, None] * kept[:, None, None, :]
    return maps[..., 1:-1, 1:-1]
