"""What a model returns, and how what its parts return is collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Result of one forward pass.

    Attributes:
        logits: [B, L, V] for padded input, [T, V] for packed input.
        hidden_states: the representations that were asked for, by canonical name and by the name that
            was asked for, [B, L, H] or [T, H].
    """

    logits: torch.Tensor
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect by name what modules return while the context is open; without modules it costs nothing.

    One thread at a time may run a model whose parts are recorded.
    """
    found: dict[str, torch.Tensor] = {}
    handles = [_keep_output(module, name, found) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_output(module: nn.Module, name: str, found: dict[str, torch.Tensor]) -> RemovableHandle:
    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        found[name] = output

    return module.register_forward_hook(keep)
