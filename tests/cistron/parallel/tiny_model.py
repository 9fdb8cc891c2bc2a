"""A language model of a few hundred weights with what makes sharding hard: a tied, a frozen and a buffered one."""

from __future__ import annotations

import torch
from torch import nn

from cistron.models.base import SequenceModel
from cistron.models.outputs import ModelOutput

VOCAB = 11
HIDDEN = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 16)
        self.down = nn.Linear(16, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class TinyModel(SequenceModel):
    family = "evo2"
    objective = "next_token"

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        with torch.device(device or "cpu"):
            self.embed = nn.Embedding(VOCAB, HIDDEN)
            self.layers = nn.ModuleList([Block(), Block(), Block()])
            self.head_bias = nn.Parameter(torch.zeros(VOCAB))
            self.frozen = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
            self.register_buffer("shift", torch.zeros(HIDDEN))
            self.register_buffer("decay", torch.full((), 0.37), persistent=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, input_ids, *, attention_mask=None, cu_seqlens=None, hidden_states=()) -> ModelOutput:
        x = self.embed(input_ids) * self.frozen + self.shift
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            past = torch.cumsum(x[start:stop], dim=0) * self.decay
            x = torch.cat([x[:start], past, x[stop:]])
        for block in self.layers:
            x = block(x)
        return ModelOutput(nn.functional.linear(x, self.embed.weight, self.head_bias))

    def init_weights(self, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            self.shift.copy_(torch.randn(HIDDEN, generator=generator))

    def decays(self, parameter_name: str) -> bool:
        return "norm" not in parameter_name and not parameter_name.endswith("bias")

    def flops_per_token(self, length: int) -> float:
        return 2.0 * self.num_parameters()


def build_tiny(device: torch.device, *, seed: int = 7) -> TinyModel:
    model = TinyModel(device)
    if device.type != "meta":
        model.init_weights(seed=seed)
    return model
