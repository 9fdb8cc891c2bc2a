"""ESM-2's configuration, in the field names of Hugging Face's ``EsmConfig``.

Only what changes the shape or the mathematics is a setting. What every ESM-2 shares (rotary positions, exact GELU, no
dropout, no normalisation of the embedding) is checked when a foreign configuration is read, and written out so that
other software finds a complete one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cistron.config import Config, resolve
from cistron.errors import ConfigError

_SHARED: Final[dict[str, Any]] = {
    "hidden_act": "gelu",
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "is_folding_model": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What makes an ``EsmConfig`` an ESM-2; a configuration that says otherwise is another model."""

_BOOKKEEPING: Final[dict[str, Any]] = {
    "architectures": ["EsmForMaskedLM"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "classifier_dropout": None,
    "bos_token_id": None,
    "eos_token_id": 2,
    "esmfold_config": None,
    "vocab_list": None,
    "use_cache": True,
}
"""The rest of a complete ``EsmConfig``; without effect on the masked language model."""

_ROTARY_PAIR: Final = 2
"""Rotary embedding turns channels in pairs."""

_UNTRAINED_POSITIONS: Final = 4
"""Published models say 1026 for crops of 1022 residues: <cls>, <eos>, and two rows of an older position numbering."""


class Esm2Config(Config):
    """Shape of an ESM-2. The defaults are those of every published size."""

    model_type: Literal["esm"] = "esm"
    """Family name, as Hugging Face spells it."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt
    """Number of blocks."""
    num_attention_heads: PositiveInt
    """Attention heads per block; hidden_size is a multiple of twice this number."""
    intermediate_size: PositiveInt
    """Inner width of the MLP; 4 x hidden_size unless given."""
    vocab_size: Literal[33] = 33
    """Number of tokens."""
    pad_token_id: Literal[1] = 1
    """Id of <pad>."""
    mask_token_id: Literal[32] = 32
    """Id of <mask>."""
    token_dropout: bool = True
    """Zero the embeddings of <mask> and rescale the others, in training and inference alike."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every layer norm."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    initializer_range: float = Field(default=0.02, ge=0)
    """Standard deviation of freshly drawn weights."""
    max_position_embeddings: PositiveInt = 1026
    """Trained length plus four; not a limit, because positions are rotary."""

    @model_validator(mode="before")
    @classmethod
    def _default_intermediate_size(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and isinstance(width := settings.get("hidden_size"), int):
            return {"intermediate_size": 4 * width, **settings}
        return settings

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % (_ROTARY_PAIR * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 2 x num_attention_heads "
                f"({self.num_attention_heads}); each head needs an even number of channels"
            )
        return self

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """Residues of the longest sequence seen in training; longer ones run, outside what the model was shown."""
        return self.max_position_embeddings - _UNTRAINED_POSITIONS

    def to_json(self) -> dict[str, Any]:
        """Return the complete ``EsmConfig`` mapping."""
        return dict(sorted({**_SHARED, **_BOOKKEEPING, **self.model_dump()}.items()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` writes, or the part of it that differs from the defaults.

        Raises:
            ConfigError: another model than ESM-2, an unknown key, or a field that is missing or out of range.
        """
        for key, expected in _SHARED.items():
            if data.get(key, expected) not in (expected, None):
                raise ConfigError(f"{key}: ESM-2 has {expected!r}, got {data[key]!r}; this is another model")
        return resolve(cls, {key: value for key, value in data.items() if key not in _SHARED.keys() | _BOOKKEEPING})

    @classmethod
    def from_hugging_face(cls, data: Mapping[str, Any]) -> Self:
        """Read an ``EsmConfig`` of any version of transformers, whose files carry dozens of keys that ESM-2 ignores.

        Raises:
            ConfigError: as :meth:`from_json`, except that unknown keys are dropped.
        """
        known = cls.model_fields.keys() | _SHARED
        return cls.from_json({key: value for key, value in data.items() if key in known and value is not None})
