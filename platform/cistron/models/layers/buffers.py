"""Buffers that keep their precision when a model is cast.

``model.bfloat16()`` and most training wrappers cast floating-point buffers along with the weights. Rotary frequencies
do not survive that: rounded to bf16, the angle at position 1,000 is off by radians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class Fp32Buffers(nn.Module):
    """A module whose own buffers move between devices but are never cast."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Apply `fn` as ``nn.Module`` does for every cast and move, then undo what it did to the buffers' dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
