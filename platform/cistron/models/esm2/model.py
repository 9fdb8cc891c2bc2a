"""ESM-2, exactly: logits, representations and contacts equal those of the published package.

Two things surprise. "Token dropout" is a deterministic rescaling that also happens at inference: <mask> embeddings are
zeroed and all others multiplied by 0.88 / (1 - share of <mask>), per sequence. And the language-model head is tied to
the embedding, so the state dict, which has the names of Hugging Face's ``EsmForMaskedLM``, has no decoder weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Final, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from cistron.errors import CapabilityError, InputError
from cistron.models.base import Objective, SequenceModel
from cistron.models.esm2.blocks import Block, LayerNorm
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.contacts import ContactHead
from cistron.models.esm2.layout import Layout, packed_layout, padded_layout
from cistron.models.layers.buffers import Fp32Buffers
from cistron.models.layers.linear import GeluLinear
from cistron.models.naming import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    MIXER,
    block_name,
    by_names_asked,
    canonical_layer,
    parsed_inner_name,
)
from cistron.models.outputs import ModelOutput, recorded
from cistron.tokenizers import ProteinTokenizer

_TRAINED_MASK_SHARE: Final = 0.15 * 0.8
"""In pretraining 15 % of the tokens were targets, and 80 % of those became <mask>."""
_SHORTEST_ROW: Final = 3
"""<cls>, one residue, <eos>."""


class Embeddings(nn.Module):
    """Token embedding with token dropout."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.mask_id = config.mask_token_id
        self.token_dropout = config.token_dropout
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id, device=device, dtype=dtype
        )

    def forward(self, input_ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Embed ids [B, L] or [T] to [..., H]; padding is zero."""
        x = self.word_embeddings(input_ids)
        if self.token_dropout:
            masked = input_ids == self.mask_id
            x = (x.masked_fill(masked[..., None], 0.0) * self._scale(masked, layout)[..., None]).to(x.dtype)
        return x if layout.real is None else x * layout.real[..., None]

    def _scale(self, masked: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return each token's factor, fp32; a sequence of nothing but <mask> is all zeros and takes any."""
        real = torch.ones_like(masked) if layout.real is None else layout.real
        kept = layout.document_sums(real) - layout.document_sums(masked)
        return (1 - _TRAINED_MASK_SHARE) * layout.document_sums(real) / kept.clamp_min(1)


class Rotary(Fp32Buffers):
    """The rotary frequencies: a stored buffer, because published checkpoints hold rounded ones that matter."""

    def __init__(self, config: Esm2Config, *, device: str | torch.device | None) -> None:
        super().__init__()
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", torch.empty(config.head_size // 2, device=device, dtype=torch.float32))
        self.inv_freq.copy_(rotary_frequencies(config))


class Encoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config, device=device, dtype=dtype) for _ in range(config.num_layers))
        self.emb_layer_norm_after = LayerNorm(config, device=device, dtype=dtype)


class Backbone(nn.Module):
    """Everything below the language-model head."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, device=device, dtype=dtype)
        self.rotary_embeddings = Rotary(config, device=device)
        self.encoder = Encoder(config, device=device, dtype=dtype)
        self.contact_head = ContactHead(config.num_layers, config.num_attention_heads, device=device)


class LanguageModelHead(nn.Module):
    """Dense, GELU, layer norm, then the transposed embedding and a bias."""

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dense = GeluLinear(config.hidden_size, config.hidden_size, device=device, dtype=dtype)
        self.layer_norm = LayerNorm(config, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Map representations [..., H] and the embedding [V, H] to logits [..., V]."""
        return functional.linear(self.layer_norm(self.dense(x)), embedding) + self.bias


class Esm2(SequenceModel):
    """The masked language model.

    Args:
        config: its shape.
        device: where the weights are made; ``meta`` makes none.
        dtype: of the weights; rotary frequencies and the contact head stay fp32.
    """

    family: ClassVar[Literal["evo2", "esm2"]] = "esm2"
    objective: ClassVar[Objective] = "masked"
    config: Esm2Config
    tokenizer: ProteinTokenizer

    def __init__(
        self, config: Esm2Config, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = ProteinTokenizer()
        self.esm = Backbone(config, device=device, dtype=dtype)
        self.lm_head = LanguageModelHead(config, device=device, dtype=dtype)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order."""
        return cast("Sequence[nn.Module]", self.esm.encoder.layer)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        hidden_states: Sequence[str | int] = (),
    ) -> ModelOutput:
        """Run the model; see :meth:`SequenceModel.forward`.

        Without `attention_mask`, padded input counts ids equal to <pad> as padding; a mask of ones switches that off.
        Packed input has no padding.
        """
        names = [canonical_layer(layer, num_layers=self.config.num_layers) for layer in hidden_states]
        layout = self._layout(input_ids, attention_mask, cu_seqlens)
        with recorded(self._inner(names)) as found:
            x = found[EMBEDDING] = self.esm.embeddings(input_ids, layout)
            for i, block in enumerate(self.blocks):
                x = block(x, layout)
                if (name := block_name(i)) in names:
                    found[name] = x
            x = found[FINAL_NORM] = self.esm.encoder.emb_layer_norm_after(x)
            logits = found[LOGITS] = self.lm_head(x, self.esm.embeddings.word_embeddings.weight)
        found = by_names_asked({name: found[name] for name in names}, hidden_states, num_layers=self.config.num_layers)
        return ModelOutput(logits=logits, hidden_states=found)

    @torch.no_grad()
    def predict_contacts(self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the probability that two residues touch.

        Args:
            input_ids: [B, L], each row ``<cls> residues <eos>`` and padding.
            attention_mask: [B, L] as in :meth:`forward`.

        Returns:
            [B, L - 2, L - 2] fp32, symmetric; row i is residue i. Entries of padding and of a shorter row's <eos> have
            no meaning.

        Raises:
            InputError: rows shorter than <cls>, one residue, <eos>.
            CapabilityError: the checkpoint came without a contact head.
        """
        if not self.esm.contact_head.fitted:
            raise CapabilityError(
                "this ESM-2 has no contact head (its regression weights are all zero): convert a checkpoint that holds "
                "one, such as Hugging Face's, or fair-esm's with its -contact-regression file beside it"
            )
        layout = self._layout(input_ids, attention_mask, None)
        if input_ids.shape[1] < _SHORTEST_ROW:
            raise InputError(f"contacts need <cls>, a residue and <eos>; got {input_ids.shape[1]} tokens per row")
        assert layout.real is not None, "padded rows know which tokens are real"
        residues = layout.real & (input_ids != self.tokenizer.eos_id)
        residues[:, [0, -1]] = False
        head = self.esm.contact_head
        logits = torch.zeros((), device=input_ids.device)
        x = self.esm.embeddings(input_ids, layout)
        for i, layer in enumerate(self.blocks):
            block = cast("Block", layer)
            q, k = (part.transpose(1, 2) for part in block.query_key(x, layout))
            scale = block.attention.self.scale
            logits = logits + head.share(i, q, k, residues, key_mask=layout.key_mask, scale=scale)
            x = block(x, layout)
        return head.probabilities(logits[:, 1:-1, 1:-1])

    def init_weights(self, *, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range); biases 0, norms 1, no contact head.

        Each tensor has a generator of its own, seeded by `seed` and the tensor's name, so its numbers depend neither
        on device or dtype nor on the rest of the model.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if self.decays(name):
                    generator = torch.Generator().manual_seed(_tensor_seed(seed, name))
                    drawn = torch.empty(parameter.shape, device="cpu").normal_(generator=generator)
                    parameter.copy_(drawn * self.config.initializer_range)
                else:  # what does not decay is a bias, or a norm with its bias
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            self.esm.embeddings.word_embeddings.weight[self.config.pad_token_id].zero_()
            self.esm.rotary_embeddings.inv_freq.copy_(rotary_frequencies(self.config))
            for buffer in self.esm.contact_head.buffers():
                buffer.zero_()

    def decays(self, parameter_name: str) -> bool:
        """Return true for matrices, the embedding included; false for biases and norms."""
        return parameter_name.endswith("weight") and "norm" not in parameter_name.lower()

    def flops_per_token(self, length: int) -> float:
        """Return twice the multiply-adds: 2 (4 H^2 + 2 H F) + 4 H L per block, 2 H^2 + 2 H V in the head."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        block = 2 * (4 * hidden**2 + 2 * hidden * inner) + 4 * hidden * length
        return float(self.config.num_layers * block + 2 * hidden * (hidden + self.config.vocab_size))

    def _inner(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Return the modules whose outputs are the mixers' and MLPs' among the given canonical names."""
        blocks = self.esm.encoder.layer
        places = {name: place for name in names if (place := parsed_inner_name(name))}
        return {
            name: blocks[index].get_submodule("attention.output" if part == MIXER else "output")
            for name, (index, part) in places.items()
        }

    def _layout(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> Layout:
        inv_freq = self.esm.rotary_embeddings.inv_freq
        if cu_seqlens is not None:
            return packed_layout(input_ids, attention_mask, cu_seqlens, inv_freq=inv_freq)
        return padded_layout(input_ids, attention_mask, pad_id=self.config.pad_token_id, inv_freq=inv_freq)


def rotary_frequencies(config: Esm2Config) -> torch.Tensor:
    """Return theta^(-2i/D) for i = 0 .. D/2 - 1, fp32 on the CPU."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    return 1.0 / config.rope_theta**exponents


def _tensor_seed(seed: int, name: str) -> int:
    """Return a 64-bit seed for one tensor."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest())
