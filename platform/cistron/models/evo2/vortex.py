"""The vortex spelling of an Evo 2: its settings, its tensor names, and the few tensors it lays out differently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, ConfigError
from cistron.models.evo2.config import ATTENTION, HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.fp8_need import OWN_WORD
from cistron.models.evo2.fp8_state import STATE_NAMES
from cistron.models.evo2.settings import FP8_OPTIONAL_WIDTH, check_constants, need
from cistron.models.evo2.spelling import Spelling, rows_by_head, rows_by_kind

_DROPPED: Final = re.compile(r"(.*\.)?_extra_state|blocks\.\d+\.(mixer\.mixer\.)?filter\.t")
"""What released files hold beside weights: FP8 states, of which only the scales are kept, and a range of integers."""

_UNEMBED: Final = "unembed.weight"
_EMBEDDING: Final = "embedding_layer.weight"

_LAYER_LISTS: Final = {
    "hcs_layer_idxs": HCS,
    "hcm_layer_idxs": HCM,
    "hcl_layer_idxs": HCL,
    "attn_layer_idxs": ATTENTION,
}
_DEFAULT_MLP_MULTIPLE: Final = 64

_CONSTANT: Final[Mapping[str, Any]] = {
    "short_filter_bias": False,
    "column_split": True,
    "column_split_hyena": False,
    "interleave": True,
    "hyena_flip_x1x2": False,
    "qkv_proj_bias": False,
    "hyena_out_proj_bias": True,
    "proj_groups": 1,
    "final_norm": True,
    "mlp_activation": "gelu",
}
"""Settings that every Evo 2 shares; another value is another model."""

_WHOLE_NAMES: Final = {
    "embedding.weight": _EMBEDDING,
    "final_norm.weight": "norm.scale",
    "unembed.weight": _UNEMBED,
}
_BLOCK_NAMES: Final = {
    "mixer_norm.weight": "pre_norm.scale",
    "mlp_norm.weight": "post_norm.scale",
    "mlp.gate.weight": "mlp.l1.weight",
    "mlp.value.weight": "mlp.l2.weight",
    "mlp.output.weight": "mlp.l3.weight",
}
_HYENA_NAMES: Final = {
    "mixer.projection.weight": "projections.weight",
    **dict.fromkeys(STATE_NAMES, "projections._extra_state"),
    "mixer.projection_taps": "filter.short_filter_weight",
    "mixer.filter.taps": "filter.h",
    "mixer.filter.log_poles": "filter.log_poles",
    "mixer.filter.residues": "filter.residues",
    "mixer.filter.skip": "filter.D",
    "mixer.output.weight": "out_filter_dense.weight",
    "mixer.output.bias": "out_filter_dense.bias",
}
_ATTENTION_NAMES: Final = {
    "mixer.qkv.weight": "inner_mha_cls.Wqkv.weight",
    "mixer.output.weight": "inner_mha_cls.out_proj.weight",
    "mixer.output.bias": "inner_mha_cls.out_proj.bias",
    "mixer.rotary.inv_freq": "inner_mha_cls.rotary_emb.inv_freq",
}


def vortex_spelling(config: Evo2Config) -> Spelling:
    """Return vortex's names and layouts for the inference form of `config`."""
    return Spelling(
        name=partial(_name, config),
        encode=partial(_encode, config),
        decode=partial(_decode, config),
        dropped=_DROPPED,
        copies={_UNEMBED: _EMBEDDING} if config.tie_embeddings else {},
    )


def config_from_vortex(settings: Mapping[str, Any], *, source: Path) -> Evo2Config:
    """Return the configuration that vortex's settings describe; those that only concern its runtime are ignored.

    Raises:
        ConfigError: a setting is missing, out of range, or makes another model than an Evo 2.
    """
    check_constants(settings, _CONSTANT, source=source)
    width, groups = need(settings, "hidden_size", source=source), need(settings, "hcm_filter_groups", source=source)
    for key, expected in (("hcs_filter_groups", groups), ("hcl_filter_groups", width)):
        if settings.get(key, expected) != expected:
            raise ConfigError(f"{source}: {key}: must be {expected} in an Evo 2 of this shape, got {settings[key]!r}")
    interpolated = settings.get("use_interpolated_rotary_pos_emb", False)
    return Evo2Config.from_json(
        {
            "vocab_size": settings.get("vocab_size", 512),
            "hidden_size": width,
            "layer_pattern": _pattern(settings, source),
            "num_attention_heads": need(settings, "num_attention_heads", source=source),
            "mlp_size": _mlp_size(settings, width),
            "short_filter_length": settings.get("short_filter_length", 3),
            "hcs_filter_length": settings.get("hcs_filter_length", 7),
            "hcm_filter_length": settings.get("hcm_filter_length", 128),
            "num_filter_groups": groups,
            "state_size": settings.get("state_size", 16),
            "rotary_base": settings.get("rotary_emb_base", 10_000),
            "rotary_scaling": settings.get("rotary_emb_scaling_factor", 1) if interpolated else 1,
            "max_length": need(settings, "max_seqlen", source=source),
            "norm_eps": settings.get("eps", 1e-6),
            "mlp_activation": "first_layer_gelu" if settings.get("evo2_style_activations", False) else "gelu",
            "attention_output_bias": settings.get("mha_out_proj_bias", True),
            "tie_embeddings": settings.get("tie_embeddings", True),
            "requires_fp8": settings.get("use_fp8_input_projections", False) and width != FP8_OPTIONAL_WIDTH,
        }
    )


def config_to_vortex(config: Evo2Config) -> dict[str, Any]:
    """Return vortex's settings of `config`.

    Raises:
        CheckpointError: vortex has no place for one of its features.
    """
    if config.hcs_bias:
        raise CheckpointError("hcs_bias: the vortex format has no skip term in HCS layers")
    layers = {
        key: [index for index, found in enumerate(config.layer_pattern) if found == symbol]
        for key, symbol in _LAYER_LISTS.items()
    }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_filters": config.hidden_size,
        "num_layers": config.num_layers,
        **layers,
        "num_attention_heads": config.num_attention_heads,
        "inner_mlp_size": config.mlp_size,
        "short_filter_length": config.short_filter_length,
        "hcs_filter_length": config.hcs_filter_length,
        "hcm_filter_length": config.hcm_filter_length,
        "hcs_filter_groups": config.num_filter_groups,
        "hcm_filter_groups": config.num_filter_groups,
        "hcl_filter_groups": config.hidden_size,
        "state_size": config.state_size,
        "rotary_emb_base": config.rotary_base,
        "use_interpolated_rotary_pos_emb": config.rotary_scaling != 1,
        "rotary_emb_scaling_factor": config.rotary_scaling,
        "max_seqlen": config.max_length,
        "eps": config.norm_eps,
        "evo2_style_activations": config.mlp_activation == "first_layer_gelu",
        "mha_out_proj_bias": config.attention_output_bias,
        "tie_embeddings": config.tie_embeddings,
        "use_fp8_input_projections": config.requires_fp8 or config.fp8_scales,
        OWN_WORD: config.requires_fp8,
        **_CONSTANT,
    }


def _name(config: Evo2Config, native: str) -> str:
    if native in _WHOLE_NAMES:
        return _WHOLE_NAMES[native]
    _, index, rest = native.split(".", maxsplit=2)
    mixer = _ATTENTION_NAMES if config.layer_pattern[int(index)] == ATTENTION else _HYENA_NAMES
    return f"blocks.{index}.{(_BLOCK_NAMES | mixer)[rest]}"


def _encode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a native tensor in vortex's layout."""
    if native.endswith("taps"):
        return tensor.unsqueeze(1)
    if native.endswith("log_poles"):
        return tensor.unsqueeze(-1)
    return rows_by_head(config, tensor) if native.endswith("qkv.weight") else tensor


def _decode(config: Evo2Config, native: str, tensor: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_encode`."""
    if native.endswith("taps"):
        return tensor.squeeze(1)
    if native.endswith("log_poles"):
        return tensor.squeeze(-1)
    return rows_by_kind(config, tensor) if native.endswith("qkv.weight") else tensor


def _pattern(settings: Mapping[str, Any], source: Path) -> str:
    """Return one symbol per layer from the four lists of indices."""
    symbols: dict[int, str] = {}
    for key, symbol in _LAYER_LISTS.items():
        for index in need(settings, key, source=source):
            if index in symbols:
                raise ConfigError(f"{source}: {key}: layer {index} is in two lists")
            symbols[index] = symbol
    count = need(settings, "num_layers", source=source)
    if sorted(symbols) != list(range(count)):
        raise ConfigError(f"{source}: the layer lists must name each of the {count} layers, got {sorted(symbols)}")
    return "".join(symbols[index] for index in range(count))


def _mlp_size(settings: Mapping[str, Any], width: int) -> int:
    """Return the inner size, which vortex derives from the width when it is not given."""
    if settings.get("inner_mlp_size"):
        return int(settings["inner_mlp_size"])
    multiple = settings.get("inner_size_multiple_of", _DEFAULT_MLP_MULTIPLE)
    return -(-int(2 * width * 4 / 3) // multiple) * multiple
