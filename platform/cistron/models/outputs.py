"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Result of one forward pass.

    Attributes:
        logits: [B, L, V] for padded input, [T, V] for packed input.
        hidden_states: the representations that were asked for, by canonical name, [B, L, H] or [T, H].
    """

    logits: torch.Tensor
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)
