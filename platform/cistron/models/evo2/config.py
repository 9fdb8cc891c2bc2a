"""Evo 2's configuration: everything that changes the shape or the mathematics of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cistron.config import Config, resolve

Parametrization = Literal["inference", "training"]

HCS: Final = "S"
HCM: Final = "D"
HCL: Final = "H"
ATTENTION: Final = "*"

_ROTARY_PAIR: Final = 2


class Evo2Config(Config):
    """Shape and mathematics of an Evo 2; the defaults are what all models released by Arc Institute share."""

    model_type: Literal["evo2"] = "evo2"
    """Names the family in files that hold either."""
    vocab_size: PositiveInt = 512
    """Rows of the embedding; token ids are bytes, the rest is padding."""
    hidden_size: PositiveInt
    """Channels of the residual stream."""
    layer_pattern: str = Field(min_length=1, pattern=r"^[SDH*]+$")
    """One symbol per layer: S (HCS, short), D (HCM, medium) and H (HCL, long) convolution, * (attention)."""
    num_attention_heads: PositiveInt
    """Heads of an attention layer."""
    mlp_size: PositiveInt
    """Inner channels of the MLP."""
    short_filter_length: PositiveInt = 3
    """Taps of the filter that follows each Hyena projection."""
    hcs_filter_length: PositiveInt = 7
    """Taps of an HCS filter."""
    hcm_filter_length: PositiveInt = 128
    """Taps of an HCM filter."""
    num_filter_groups: PositiveInt
    """Groups of neighbouring channels that share an HCS or HCM filter."""
    state_size: PositiveInt = 16
    """Poles of an HCL filter."""
    rotary_base: PositiveFloat = 10_000.0
    """Base of the rotary frequencies of a fresh model; a loaded one uses the stored frequencies."""
    rotary_scaling: PositiveFloat = 1.0
    """Positions are divided by it (linear interpolation)."""
    max_length: PositiveInt
    """Longest context in nt that the model was trained for."""
    norm_eps: PositiveFloat = 1e-6
    """Guards the division in RMSNorm."""
    norm_eps_inside: bool = False
    """Put norm_eps under the root, as training code does, instead of outside, as the published inference code does."""
    mlp_activation: Literal["first_layer_gelu", "gelu"] = "first_layer_gelu"
    """Gate of the MLPs: GELU in layer 0 and none after it (Arc Institute), or GELU everywhere (NVIDIA)."""
    hcs_bias: bool = False
    """Give HCS filters a skip term per group (NVIDIA)."""
    attention_output_bias: bool = True
    """Give the attention output projection a bias."""
    tie_embeddings: bool = True
    """Use the embedding as the output layer."""
    embedding_init_std: PositiveFloat | None = None
    """Standard deviation of a fresh embedding; that of the other matrices if not given."""
    requires_fp8: bool = False
    """The weights are known to degrade without FP8 input projections."""
    fp8_scales: bool = False
    """The checkpoint holds the static FP8 scales of the input projections; without them FP8 uses 1."""
    parametrization: Parametrization = "inference"
    """Learn the filters themselves (inference, what released weights hold), or savanna's factors of them (training)."""
    filter_cache_length: PositiveInt = 8_192
    """Length over which a fresh model lays out HCM's decay and scales its filters."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        if self.hidden_size % (_ROTARY_PAIR * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 2 x num_attention_heads "
                f"({self.num_attention_heads}); each head needs an even number of channels"
            )
        if self.hidden_size % self.num_filter_groups:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_filter_groups {self.num_filter_groups}"
            )
        if self.filter_cache_length < self.hcm_filter_length:
            raise ValueError(
                f"filter_cache_length {self.filter_cache_length} is below hcm_filter_length {self.hcm_filter_length}"
            )
        return self

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layer_pattern)

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads

    def count(self, symbol: str) -> int:
        """Return the number of layers of one kind."""
        return Counter(self.layer_pattern)[symbol]

    def to_json(self) -> dict[str, Any]:
        """Return every setting, ready for ``config.json``."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` writes, or the part of it that differs from the defaults.

        Raises:
            ConfigError: an unknown key, or a field that is missing or out of range.
        """
        return resolve(cls, data)
