"""savanna's settings of an Evo 2, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cistron.errors import CheckpointError, ConfigError
from cistron.models.evo2.config import ATTENTION, HCL, HCM, HCS, Evo2Config
from cistron.models.evo2.fp8_need import OWN_WORD
from cistron.models.evo2.settings import FP8_OPTIONAL_WIDTH, check_constants, need
from cistron.models.sources import TensorSource

_OPERATORS: Final = {"hyena_se": HCS, "hyena_mr": HCM, "hyena": HCL, "flash_te": ATTENTION}
_OPERATOR_ALIASES: Final = {"flash": ATTENTION, "flash_v2": ATTENTION, "ring": ATTENTION, "global": ATTENTION}
_CONSTANT: Final[Mapping[str, Any]] = {
    "norm": "rmsnorm",
    "mlp_type": "llama",
    "prenorm": True,
    "postnorm": False,
    "pre_mlp_norm": True,
    "outer_mlp_norm": False,
    "gpt_j_residual": False,
    "normalize_hyena_filters": False,
    "hyena_filter_cls": "implicit_modal",
    "hyena_medium_filter_cls": "explicit_single_decay",
    "rotary_pct": 1,
}
"""Settings that every Evo 2 shares; another value is another model."""


def config_from_savanna(settings: Mapping[str, Any], source: TensorSource, *, path: Path) -> Evo2Config:
    """Return the configuration that savanna's settings describe; those that only concern its training are ignored.

    The settings do not say how many rows the embedding and the MLPs were padded to; the tensors do.

    Raises:
        ConfigError: a setting is missing, out of range, or makes another model than an Evo 2.
    """
    given = {key.replace("-", "_"): value for key, value in settings.items()}
    check_constants(given, _CONSTANT, source=path)
    width, groups = need(given, "hidden_size", source=path), need(given, "num_groups_hyena_medium", source=path)
    for key, expected in (("num_groups_hyena_short", groups), ("num_groups_hyena", width)):
        if given.get(key, expected) != expected:
            raise ConfigError(f"{path}: {key}: must be {expected} in an Evo 2 of this shape, got {given[key]!r}")
    scaled = given.get("pos_emb", "rotary_linear_scaled") == "rotary_linear_scaled"
    return Evo2Config.from_json(
        {
            "vocab_size": _rows(source, "sequential.0.word_embeddings.weight"),
            "hidden_size": width,
            "layer_pattern": _pattern(given, path),
            "num_attention_heads": need(given, "num_attention_heads", source=path),
            "mlp_size": _rows(source, "sequential.2.mlp.w1.weight"),
            "short_filter_length": given.get("short_conv_L", 3),
            "hcs_filter_length": given.get("hyena_se_len", 7),
            "hcm_filter_length": given.get("hyena_mr_len", 128),
            "num_filter_groups": groups,
            "state_size": given.get("hyena_filter_order", 16),
            "rotary_base": given.get("rotary_emb_base", 10_000),
            "rotary_scaling": given.get("rotary_emb_scaling_factor", 1) if scaled else 1,
            "max_length": need(given, "seq_length", source=path),
            "norm_eps": given.get("rms_norm_epsilon", 1e-6),
            "norm_eps_inside": True,
            "tie_embeddings": not given.get("no_weight_tying", False),
            "requires_fp8": given.get("use_fp8_input_projections", False) and width != FP8_OPTIONAL_WIDTH,
            "parametrization": "training",
        }
    )


def config_to_savanna(config: Evo2Config) -> dict[str, Any]:
    """Return savanna's settings of `config`.

    Raises:
        CheckpointError: savanna has no place for one of its features.
    """
    if config.hcs_bias or not config.attention_output_bias or config.mlp_activation != "first_layer_gelu":
        raise CheckpointError(
            "the savanna format has no place for hcs_bias, a missing attention_output_bias or mlp_activation: gelu"
        )
    operators = {symbol: name for name, symbol in _OPERATORS.items()}
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_groups_hyena": config.hidden_size,
        "num_groups_hyena_medium": config.num_filter_groups,
        "num_groups_hyena_short": config.num_filter_groups,
        "operator_config": [[[operators[symbol]], 1] for symbol in config.layer_pattern],
        "short_conv_L": config.short_filter_length,
        "hyena_se_len": config.hcs_filter_length,
        "hyena_mr_len": config.hcm_filter_length,
        "hyena_filter_order": config.state_size,
        "pos_emb": "rotary_linear_scaled",
        "rotary_emb_base": config.rotary_base,
        "rotary_emb_scaling_factor": config.rotary_scaling,
        "seq_length": config.max_length,
        "rms_norm_epsilon": config.norm_eps,
        "no_weight_tying": not config.tie_embeddings,
        "use_fp8_input_projections": config.requires_fp8 or config.fp8_scales,
        OWN_WORD: config.requires_fp8,
        **_CONSTANT,
    }


def _pattern(settings: Mapping[str, Any], path: Path) -> str:
    """Return one symbol per layer from runs such as ``[["hyena_se"], 1]``."""
    known = _OPERATORS | _OPERATOR_ALIASES
    symbols: list[str] = []
    for run in need(settings, "operator_config", source=path):
        names, count = run if isinstance(run, list | tuple) and len(run) == 2 else ([run], 1)
        for name in list(names) * int(count):
            if name not in known:
                raise ConfigError(f"{path}: operator_config: no operator {name!r} in Evo 2 (known: {', '.join(known)})")
            symbols.append(known[name])
    if settings.get("num_layers", len(symbols)) != len(symbols):
        raise ConfigError(f"{path}: operator_config has {len(symbols)} layers, num_layers is {settings['num_layers']}")
    return "".join(symbols)


def _rows(source: TensorSource, name: str) -> int:
    if name not in source.shapes:
        raise CheckpointError(f"missing tensor {name}")
    return source.shapes[name][0]
