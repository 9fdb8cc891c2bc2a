"""The spelling of ESM-2 in BioNeMo's recipes, built of Transformer Engine's layers (``NVEsmForMaskedLM``).

A norm is part of the linear map behind it, query, key and value are one matrix, and vocabularies may be padded: rows of
the embedding with zeros, the bias with the least number of its dtype, so that no padding is ever predicted. The
software has no contact head and computes the rotary frequencies. So that neither is lost, both are written to a file of
their own, which it ignores and which is read again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import ConfigError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.spelling import CONTACT_HEAD, EMBEDDING, INV_FREQ, Entry, Spelling, weight_names

EXTRAS: Final = "esm2_extras.st"
"""File of what Transformer Engine's model has no place for: safetensors in native names, under an ending that nothing
which loads all ``*.safetensors`` of a folder looks for."""

_MODEL_TYPE: Final = "nv_esm"
_PADDED_VOCABULARY: Final = 64
"""Rows written, which is the recipes' default; other files have other numbers, published ones no padding at all."""

_WRITTEN_SETTINGS: Final[Mapping[str, Any]] = {
    "architectures": ["NVEsmForMaskedLM"],
    "model_type": _MODEL_TYPE,
    "add_pooling_layer": False,
    "attn_input_format": "bshd",
    "attn_mask_type": "padding",
    "encoder_activation": "gelu",
    "fuse_qkv_params": True,
    "layer_precision": None,
    "max_seq_length": None,
    "micro_batch_size": None,
    "padded_vocab_size": _PADDED_VOCABULARY,
    "qkv_weight_interleaved": True,
    "use_quantized_model_init": False,
}

_LAYER: Final = {
    "attention.LayerNorm.": "self_attention.layernorm_qkv.layer_norm_",
    "attention.output.dense.": "self_attention.proj.",
    "LayerNorm.": "layernorm_mlp.layer_norm_",
    "intermediate.dense.": "layernorm_mlp.fc1_",
    "output.dense.": "layernorm_mlp.fc2_",
}
_WHOLE: Final = {
    EMBEDDING: "model.embeddings.word_embeddings.weight",
    "esm.encoder.emb_layer_norm_after.weight": "model.encoder.emb_layer_norm_after.weight",
    "esm.encoder.emb_layer_norm_after.bias": "model.encoder.emb_layer_norm_after.bias",
    "lm_head.dense.weight": "lm_head.dense.weight",
    "lm_head.dense.bias": "lm_head.dense.bias",
    "lm_head.layer_norm.weight": "lm_head.decoder.layer_norm_weight",
    "lm_head.layer_norm.bias": "lm_head.decoder.layer_norm_bias",
    "lm_head.bias": "lm_head.decoder.bias",
}
_QKV: Final = "self_attention.layernorm_qkv."
_KINDS: Final = ("query", "key", "value")
_NATIVE_LAYER: Final = re.compile(r"esm\.encoder\.layer\.(\d+)\.(.+\.)(weight|bias)")
_UNUSED: Final = re.compile(r"(.*\.)?_extra_state|model\.pooler\.dense\.(weight|bias)")
"""States of FP8 layers, and a layer that the masked language model does not have."""


def bionemo_te_spelling(config: Esm2Config, settings: Mapping[str, Any] | None = None) -> Spelling:
    """Return the tensors of an ``NVEsmForMaskedLM`` in a folder of `settings`, or in the folders that we write."""
    settings = {**_WRITTEN_SETTINGS, **(settings or {})}
    rows = settings["padded_vocab_size"] or config.vocab_size
    entries: dict[str, Entry] = {}
    for native in weight_names(config):
        if native in _WHOLE:
            entries[_WHOLE[native]] = Entry((native,))
        elif "attention.self." not in native:
            entries[_layer_name(native)] = Entry((native,))
    for layer in range(config.num_layers):
        entries |= _qkv_entries(config, layer, settings)
    for name, native, padding in (
        (_WHOLE[EMBEDDING], EMBEDDING, _zeros),
        ("lm_head.decoder.weight", EMBEDDING, _zeros),
        (_WHOLE["lm_head.bias"], "lm_head.bias", _least),
    ):
        stored = name in _WHOLE.values()
        entries[name] = Entry(
            (native,),
            required=stored,
            written=stored,
            pack=partial(_padded, rows, padding),
            unpack=partial(_cut, config.vocab_size),
        )
    extras = {INV_FREQ: INV_FREQ, "model.encoder.rotary_embeddings.inv_freq": INV_FREQ}
    extras |= {name: name for name in CONTACT_HEAD}
    entries |= {name: Entry((native,), required=False, written=False) for name, native in extras.items()}
    return Spelling(entries, unused=_UNUSED)


def modern_name(name: str) -> str:
    """Undo the prefix of the first published files, which was that of Hugging Face's model."""
    return f"model.{name.removeprefix('esm.')}" if name.startswith("esm.") else name


def config_from_bionemo_te(settings: Mapping[str, Any], *, path: Path) -> Esm2Config:
    """Return the configuration that the settings of an ``NVEsmConfig`` describe.

    Raises:
        ConfigError: another model, or a setting out of range.
    """
    for key, expected in (("model_type", _MODEL_TYPE), ("encoder_activation", "gelu")):
        if settings.get(key, expected) != expected:
            raise ConfigError(f"{path}: {key}: the bionemo-te format has {expected!r}, got {settings[key]!r}")
    rows = settings.get("padded_vocab_size")
    config = Esm2Config.from_hugging_face({**settings, "model_type": "esm"})
    if rows is not None and (not isinstance(rows, int) or rows < config.vocab_size):
        raise ConfigError(f"{path}: padded_vocab_size must be {config.vocab_size} or more, got {rows!r}")
    return config


def config_to_bionemo_te(config: Esm2Config) -> dict[str, Any]:
    """Return the ``NVEsmConfig`` of `config`."""
    return {**config.to_json(), **_WRITTEN_SETTINGS}


def _layer_name(native: str) -> str:
    """Return the name of a layer's tensor other than queries, keys and values."""
    match = _NATIVE_LAYER.fullmatch(native)
    assert match is not None, f"{native} is no tensor of a layer"
    return f"model.encoder.layers.{match[1]}.{_LAYER[match[2]]}{match[3]}"


def _qkv_entries(config: Esm2Config, layer: int, settings: Mapping[str, Any]) -> dict[str, Entry]:
    """Return a layer's queries, keys and values: one tensor, in the order of heads or of kinds, or three."""
    entries: dict[str, Entry] = {}
    for leaf in ("weight", "bias"):
        natives = tuple(f"esm.encoder.layer.{layer}.attention.self.{kind}.{leaf}" for kind in _KINDS)
        stem = f"model.encoder.layers.{layer}.{_QKV}"
        if not settings["fuse_qkv_params"]:
            entries |= {f"{stem}{kind}_{leaf}": Entry((native,)) for kind, native in zip(_KINDS, natives, strict=True)}
        elif settings["qkv_weight_interleaved"]:
            heads = config.num_attention_heads
            pack, unpack = partial(_by_head, heads), partial(_by_kind, heads)
            entries[f"{stem}{leaf}"] = Entry(natives, pack=pack, unpack=unpack)
        else:
            entries[f"{stem}{leaf}"] = Entry(natives, pack=_joined_kinds, unpack=_cut_kinds)
    return entries


def _joined_kinds(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces))


def _cut_kinds(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.chunk(len(_KINDS))


def _by_head(heads: int, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Turn queries, keys and values, each [A D, ...], into [A 3 D, ...]: those of a head together."""
    return torch.stack([piece.unflatten(0, (heads, -1)) for piece in pieces], dim=1).flatten(0, 2)  # type: ignore[no-untyped-call]


def _by_kind(heads: int, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Undo :func:`_by_head`."""
    pieces = tensor.unflatten(0, (heads, len(_KINDS), -1)).unbind(dim=1)  # type: ignore[no-untyped-call]
    return [piece.flatten(0, 1) for piece in pieces]


def _padded(rows: int, padding: Any, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    [tensor] = pieces
    return torch.cat([tensor, padding(tensor, rows - len(tensor))]) if rows > len(tensor) else tensor


def _cut(rows: int, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return [tensor[:rows]]


def _zeros(like: torch.Tensor, rows: int) -> torch.Tensor:
    return like.new_zeros(rows, *like.shape[1:])


def _least(like: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a bias under which no token is ever predicted."""
    return like.new_full((rows,), torch.finfo(like.dtype).min)
