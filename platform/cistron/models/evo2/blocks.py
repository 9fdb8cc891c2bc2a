"""The layer of Evo 2: mixer and MLP, each behind a norm and beside the residual stream.

The mixers are in ``mixer`` and ``attention``.
"""

from __future__ import annotations

import torch
from torch import nn

from cistron.models.evo2 import attention, mixer
from cistron.models.evo2.cache import LayerState
from cistron.models.evo2.config import ATTENTION, Evo2Config
from cistron.models.evo2.layout import Layout
from cistron.models.layers.linear import Linear
from cistron_kernels.glu import Activation, glu
from cistron_kernels.rms_norm import add_rms_norm, rms_norm


class RmsNorm(nn.Module):
    """Root-mean-square norm over the hidden dimension."""

    def __init__(self, config: Evo2Config) -> None:
        super().__init__()
        self.eps, self.eps_inside = config.norm_eps, config.norm_eps_inside
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]."""
        return rms_norm(x, self.weight, eps=self.eps, eps_inside=self.eps_inside)


class AddRmsNorm(RmsNorm):
    """The same norm behind a residual addition."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return the normalised sum of x and residual [..., H], and the sum."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps, eps_inside=self.eps_inside)


class Mlp(nn.Module):
    """A gated linear unit between two projections, without biases."""

    def __init__(self, config: Evo2Config, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.value = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.output = Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to [..., H]."""
        return self.output(glu(self.gate(x), self.value(x), activation=self.activation))


class Block(nn.Module):
    """One layer: mixer and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Evo2Config, index: int) -> None:
        super().__init__()
        symbol = config.layer_pattern[index]
        gelu = config.mlp_activation == "gelu" or index == 0
        self.mixer_norm = RmsNorm(config)
        self.mixer = attention.Attention(config) if symbol == ATTENTION else mixer.HyenaMixer(config, symbol)
        self.mlp_norm = AddRmsNorm(config)
        self.mlp = Mlp(config, "gelu" if gelu else "identity")

    def forward(self, x: torch.Tensor, layout: Layout, state: LayerState | None = None) -> torch.Tensor:
        """Map the residual stream [B, L, H] or [T, H] to the next; `state` is updated in place."""
        normalised, x = self.mlp_norm(self.mixer(self.mixer_norm(x), layout, state), x)
        return x + self.mlp(normalised)
