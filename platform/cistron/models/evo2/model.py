"""Evo 2, exactly: logits equal those of the published package.

What is easy to get wrong, and is fixed by the released weights: the gate of the MLP is a GELU in layer 0 and the
identity after it; the three rows of a channel in a Hyena projection are neighbours; RMSNorm adds its epsilon outside
the root. The mixers are in ``mixer`` and ``attention``.

A model may be cast to bf16; HCL's poles and residues, the factors of the training form and the rotary frequencies then
stay in fp32 (``fp32_names``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from cistron.errors import InputError
from cistron.models.base import Objective, SequenceModel
from cistron.models.evo2 import attention, hyena, mixer
from cistron.models.evo2.blocks import Block, RmsNorm
from cistron.models.evo2.cache import Cache
from cistron.models.evo2.config import ATTENTION, HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.initial import initial_tensor
from cistron.models.evo2.layout import Layout, cached_layout, packed_layout, padded_layout
from cistron.models.layers.buffers import Fp32Buffers
from cistron.models.layers.linear import Linear
from cistron.models.naming import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    block_name,
    by_names_asked,
    canonical_layer,
    parsed_inner_name,
)
from cistron.models.outputs import ModelOutput, recorded
from cistron.tokenizers import ByteTokenizer


class Evo2(SequenceModel):
    """The DNA language model.

    Args:
        config: its shape and mathematics.
        device: where the weights are made, with the values of ``init_weights(seed=0)``; ``meta`` makes none.
        dtype: of the weights; those in ``fp32_names`` stay in fp32 when it is a half precision.
    """

    family: ClassVar[Literal["evo2", "esm2"]] = "evo2"
    objective: ClassVar[Objective] = "next_token"
    config: Evo2Config
    tokenizer: ByteTokenizer

    def __init__(
        self, config: Evo2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = ByteTokenizer()
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self._modules["blocks"] = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
            self.final_norm = RmsNorm(config)
            self.unembed: Linear | None = None
            if not config.tie_embeddings:
                self.unembed = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype or torch.get_default_dtype())
        target = torch.device(device) if device is not None else torch.get_default_device()
        if target.type != "meta":
            self.to_empty(device=target)
            self.init_weights(seed=0)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order."""
        return cast("Sequence[nn.Module]", self._modules["blocks"])

    @property
    def head(self) -> torch.Tensor:
        """The matrix [V, H] whose product with the representation after the final norm are the logits."""
        return self.embedding.weight if self.unembed is None else self.unembed.weight

    @property
    def fp32_names(self) -> frozenset[str]:
        """Names in the state dict that a cast to a half precision leaves in fp32."""
        return frozenset(
            f"{prefix}.{name}" for prefix, module in self.fp32_modules() for name in module.state_dict(keep_vars=True)
        )

    def fp32_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that hold them, by name, for wrappers that cast module by module."""
        for name, module in self.named_modules():
            if isinstance(module, hyena.Fp32Module | Fp32Buffers):
                yield name, module

    def new_cache(self, batch_size: int, *, dtype: torch.dtype | None = None, reserve: int = 0) -> Cache:
        """Return the state of `batch_size` rows that have read nothing.

        Args:
            batch_size: number of rows.
            dtype: of keys, values and filter histories; the embedding's if not given. HCL's states are fp32.
            reserve: tokens per row for whose keys and values room is made at once. More may follow, but then the
                buffers grow, which for a moment needs the old and the new ones.
        """
        if batch_size < 1:
            raise InputError(f"a cache needs at least one row, got batch_size={batch_size}")
        like = torch.empty(0, device=self.device, dtype=dtype or self.embedding.weight.dtype)
        layers = [
            attention.empty_state(self.config, batch_size, like, reserve=reserve)
            if symbol == ATTENTION
            else mixer.empty_state(self.config, symbol, batch_size, like)
            for symbol in self.config.layer_pattern
        ]
        return Cache(lengths=torch.zeros(batch_size, dtype=torch.int64, device=self.device), layers=layers)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        hidden_states: Sequence[str | int] = (),
        cache: Cache | None = None,
        with_logits: bool = True,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [B, L], or packed [T] when `cu_seqlens` is given.
            attention_mask: [B, L], true (or 1) at real tokens; padding is on the right. Logits there have no meaning.
            cu_seqlens: [N+1] int, offsets of the packed documents, from 0 to T.
            hidden_states: names or indices of the representations to return.
            cache: continue its rows with `input_ids`, any number of tokens at a time, and update it; without gradients.
            with_logits: multiply by `head`. Otherwise the logits are of no token id, [B, L, 0] or [T, 0].

        Raises:
            InputError: the shapes contradict each other, or `cache` is given with packed input.
            UnknownNameError: a representation of that name does not exist.
        """
        names = {canonical_layer(layer, num_layers=self.config.num_layers) for layer in hidden_states}
        layout = _layout(input_ids, attention_mask, cu_seqlens, cache, vocab_size=self.config.vocab_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None), recorded(self._inner(names)) as inner:
            logits, found = self._run(input_ids, layout, cache, names, with_logits=with_logits)
        if cache is not None:
            cache.advance(input_ids.shape[1] if layout.lengths is None else layout.lengths)
        found = by_names_asked(found | inner, hidden_states, num_layers=self.config.num_layers)
        return ModelOutput(logits=logits, hidden_states=found)

    def init_weights(self, *, seed: int) -> None:
        """Fill every parameter and buffer with the published initialisation, the same numbers for the same seed."""
        with torch.no_grad():
            for name, tensor in self.state_dict(keep_vars=True).items():
                tensor.copy_(initial_tensor(self.config, name, tensor.shape, seed=seed))

    def decays(self, parameter_name: str) -> bool:
        """Return true for matrices, the embedding included; false for biases, norms, filters and skip terms."""
        return parameter_name.endswith(".weight") and not parameter_name.endswith("norm.weight")

    def flops_per_token(self, length: int) -> float:
        """Return twice the multiply-adds, averaged over a document of `length` tokens.

        Matrix products 8 H^2 + 6 H F per layer and 2 H V in the head; attention counts what is causally visible,
        2 H (L + 1) per layer; the projection filter takes 18 H, HCS 2 K H, HCM 2 K H, HCL 10 H log2 L, the cost of an
        FFT, so that the number compares with published throughputs.
        """
        config = self.config
        width, layers = config.hidden_size, config.num_layers
        matrices = layers * (8 * width + 6 * config.mlp_size) + 2 * config.vocab_size
        num_hyena = layers - config.count(ATTENTION)
        filters = (
            num_hyena * 6 * config.short_filter_length
            + config.count(HCS) * 2 * config.hcs_filter_length
            + config.count(HCM) * 2 * config.hcm_filter_length
            + config.count(HCL) * 10 * math.log2(max(length, 2))
        )
        return float(width * (matrices + filters + config.count(ATTENTION) * 2 * (length + 1)))

    def _run(
        self, input_ids: torch.Tensor, layout: Layout, cache: Cache | None, names: set[str], *, with_logits: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the logits and the representations of the given canonical names."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, x: torch.Tensor) -> torch.Tensor:
            if name in names:
                found[name] = x
            return x

        x = keep(EMBEDDING, self.embedding(input_ids))
        for index, block in enumerate(self.blocks):
            x = keep(block_name(index), block(x, layout, None if cache is None else cache.layers[index]))
        x = keep(FINAL_NORM, self.final_norm(x))
        if not with_logits:
            return keep(LOGITS, x[..., :0]), found
        logits = functional.linear(x, self.embedding.weight) if self.unembed is None else self.unembed(x)
        return keep(LOGITS, logits), found

    def _inner(self, names: set[str]) -> dict[str, nn.Module]:
        """Return the mixers and MLPs among the given canonical names."""
        parts = {name: place for name in names if (place := parsed_inner_name(name))}
        return {name: getattr(self.blocks[index], part) for name, (index, part) in parts.items()}


def _layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cache: Cache | None,
    *,
    vocab_size: int,
) -> Layout:
    """Return the layout of one of the three forms of input."""
    if cu_seqlens is None:
        if cache is None:
            return padded_layout(input_ids, attention_mask, vocab_size=vocab_size)
        return cached_layout(input_ids, attention_mask, cache, vocab_size=vocab_size)
    if cache is not None:
        raise InputError("a cache holds rows, so it does not go with packed input; pass input_ids [B, L]")
    return packed_layout(input_ids, attention_mask, cu_seqlens, vocab_size=vocab_size)
