"""Megatron-Bridge's settings of an Evo 2 (the fields of BioNeMo's model provider), and ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from cistron.config import parse_yaml
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.fp8_need import OWN_WORD
from cistron.models.evo2.settings import check_constants, need
from cistron.models.sources import TensorSource

RUN_CONFIG: Final = "run_config.yaml"
MODEL_SECTION: Final = "model"
OWN_SECTION: Final = "cistron"
"""Section of ``run_config.yaml`` for what the model's provider has no field for."""

_PROVIDER: Final = "bionemo.evo2.models.evo2_provider.HyenaModelProvider"
_CONSTANT: Final[Mapping[str, Any]] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
"""Settings that every Evo 2 shares; another value is another model."""

LATEST: Final = "latest_checkpointed_iteration.txt"
_COUNTERS: Final = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_BACKENDS: Final = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the model's settings that lie beside the tensors, those of our own section among them; or none."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        return {}
    return model_settings(parse_yaml(path.read_text(), source=str(path)))


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's settings out of a whole run's, or the settings as they are."""
    if not isinstance(settings.get(MODEL_SECTION), Mapping):
        return dict(settings)
    return {**settings[MODEL_SECTION], **(settings.get(OWN_SECTION) or {})}


def config_from_mbridge(settings: Mapping[str, Any], source: TensorSource, *, path: Path) -> Evo2Config:
    """Return the configuration that a provider's settings describe; those that only concern training are ignored.

    Raises:
        ConfigError: a setting is missing, out of range, or makes another model than an Evo 2.
    """
    settings = {key: value for key, value in settings.items() if value is not None}  # Null means the default.
    width = need(settings, "hidden_size", source=path)
    groups = need(settings, "num_groups_hyena_medium", source=path)
    shared = {"num_groups_hyena": width, "num_groups_hyena_short": groups}
    check_constants(settings, {**_CONSTANT, **shared}, source=path)
    arc_style = settings.get("remove_activation_post_first_layer", True)
    return Evo2Config.from_json(
        {
            "vocab_size": _vocabulary(settings, source),
            "hidden_size": width,
            "layer_pattern": need(settings, "hybrid_override_pattern", source=path),
            "num_attention_heads": need(settings, "num_attention_heads", source=path),
            "mlp_size": need(settings, "ffn_hidden_size", source=path),
            "short_filter_length": settings.get("short_conv_L", 3),
            "hcs_filter_length": settings.get("hyena_short_conv_len", 7),
            "hcm_filter_length": settings.get("hyena_medium_conv_len", 128),
            "num_filter_groups": groups,
            "state_size": settings.get("hyena_filter_order", 16),
            "rotary_base": settings.get("rotary_base", 10_000),
            "rotary_scaling": settings.get("seq_len_interpolation_factor", 1),
            "max_length": need(settings, "seq_length", source=path),
            "norm_eps": settings.get("layernorm_epsilon", 1e-6),
            "norm_eps_inside": True,
            "mlp_activation": "first_layer_gelu" if arc_style else "gelu",
            "hcs_bias": settings.get("use_short_conv_bias", False),
            "attention_output_bias": settings.get("add_attn_proj_bias", True),
            "tie_embeddings": settings.get("share_embeddings_and_output_weights", True),
            "embedding_init_std": settings.get("embedding_init_method_std"),
            "requires_fp8": settings.get("vortex_style_fp8", False),
            "parametrization": "training",
            **({"filter_cache_length": settings["filter_cache_length"]} if "filter_cache_length" in settings else {}),
        }
    )


def rounds_frequencies(settings: Mapping[str, Any], config: Evo2Config) -> bool:
    """Return whether the model learned with rotary frequencies rounded to bf16.

    Those of Arc Institute did, and checkpoints in its MLP style are theirs or continue theirs; the format's own
    software computes exact ones. The setting ``round_inv_freq`` decides otherwise.
    """
    return bool(settings.get("round_inv_freq", config.mlp_activation == "first_layer_gelu"))


def run_config(config: Evo2Config, *, round_inv_freq: bool) -> str:
    """Return ``run_config.yaml`` with the model's settings; training's are not known."""
    model = {
        "_target_": _PROVIDER,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "hybrid_override_pattern": config.layer_pattern,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.mlp_size,
        "num_groups_hyena": config.hidden_size,
        "num_groups_hyena_medium": config.num_filter_groups,
        "num_groups_hyena_short": config.num_filter_groups,
        "vocab_size": config.vocab_size,
        "seq_length": config.max_length,
        "rotary_base": int(config.rotary_base) if config.rotary_base.is_integer() else config.rotary_base,
        "seq_len_interpolation_factor": config.rotary_scaling if config.rotary_scaling != 1 else None,
        "layernorm_epsilon": config.norm_eps,
        "remove_activation_post_first_layer": config.mlp_activation == "first_layer_gelu",
        "use_short_conv_bias": config.hcs_bias,
        "add_attn_proj_bias": config.attention_output_bias,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        "embedding_init_method_std": config.embedding_init_std,
        "vortex_style_fp8": config.requires_fp8,
        **_CONSTANT,
    }
    own = {
        "round_inv_freq": round_inv_freq,
        "filter_cache_length": config.filter_cache_length,
        OWN_WORD: config.requires_fp8,
        # The provider takes these from constants of its own.
        "short_conv_L": config.short_filter_length,
        "hyena_short_conv_len": config.hcs_filter_length,
        "hyena_medium_conv_len": config.hcm_filter_length,
        "hyena_filter_order": config.state_size,
    }
    return yaml.safe_dump({MODEL_SECTION: model, OWN_SECTION: own}, sort_keys=False)


def write_run_files(destination: Path, iteration: int) -> None:
    """Write what Megatron-Bridge expects around the tensors: the latest iteration, and the state of a run at rest."""
    folder = destination / f"iter_{iteration:07d}"
    folder.mkdir()
    (destination / LATEST).write_text(f"{iteration}\n")
    progress = {
        "step": torch.tensor(iteration, dtype=torch.int32),
        **{name: torch.tensor(0, dtype=torch.int32) for name in _COUNTERS},
        "floating_point_operations_so_far": torch.tensor(0, dtype=torch.float64),
        **{name: torch.tensor(True) for name in ("do_train", "do_valid", "do_test")},
    }
    torch.save(progress, destination / "latest_train_state.pt")
    torch.save(progress, folder / "train_state.pt")
    torch.save({"checkpoint_version": 3.0, "iteration": iteration}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_BACKENDS) + "\n")


def _vocabulary(settings: Mapping[str, Any], source: TensorSource) -> int:
    """Return the rows of the embedding: stated and padded as the provider does, or those that are stored."""
    stated = settings.get("vocab_size")
    if stated is None:
        embedding = source.shapes.get("embedding.word_embeddings.weight")
        return embedding[0] if embedding else 512
    multiple = settings.get("make_vocab_size_divisible_by", 128) if settings.get("should_pad_vocab", False) else 1
    return -(-int(stated) // multiple) * multiple
