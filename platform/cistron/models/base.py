"""What every model of Cistron is, to the code that trains, shards, scores and serves it.

Shape legend used in the models: B batch, L length, T packed tokens (all documents end to end), N documents, H hidden
size, A attention heads, D head size, V vocabulary, F inner size of the MLP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from cistron.config import Config
from cistron.models.outputs import ModelOutput
from cistron.tokenizers import Tokenizer

Objective = Literal["next_token", "masked"]


class SequenceModel(nn.Module, ABC):
    """A language model over biological sequence.

    Parallelism is applied from outside, to ``blocks``; ``forward`` is single-device mathematics. The state dict's keys
    and shapes are the native checkpoint's.
    """

    family: ClassVar[Literal["evo2", "esm2"]]
    objective: ClassVar[Objective]
    config: Config
    tokenizer: Tokenizer
    precision_path: str = "as built"
    """The arithmetic that ``load_model`` chose: bf16, fp32, fp8, fp8_emulated, fp8_hopper_emulated, int8."""
    precision_reason: str = "not loaded by load_model"

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated layers, in order: the unit of sharding, recomputation and naming (``blocks.0`` ...)."""

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        hidden_states: Sequence[str | int] = (),
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [B, L], or packed [T] when `cu_seqlens` is given.
            attention_mask: [B, L], true (or 1) at real tokens; padding is on the right.
            cu_seqlens: [N+1] int, offsets of the packed documents, from 0 to T.
            hidden_states: names or indices of the representations to return.

        Raises:
            InputError: the shapes contradict each other, or an option does not apply.
            UnknownNameError: a representation of that name does not exist.
        """

    @abstractmethod
    def init_weights(self, *, seed: int) -> None:
        """Fill every parameter and buffer with the published initialisation, the same numbers for the same seed."""

    @abstractmethod
    def decays(self, parameter_name: str) -> bool:
        """Return whether weight decay applies to the parameter of that name."""

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Return the floating-point operations of one token's forward pass in a document of `length` tokens."""

    def num_parameters(self) -> int:
        """Return the number of trainable numbers, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Typed shell around ``nn.Module.__call__``."""
        return super().__call__(*args, **kwargs)
