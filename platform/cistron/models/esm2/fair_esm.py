"""The fair-esm spelling of an ESM-2: its tensor names, its settings, and its two files.

A published model is a pickle of ``{"cfg": {"model": settings}, "model": tensors}``, and its contact regression another
beside it, ``<stem>-contact-regression.pt``. We write the same two files, or safetensors with everything in one, whose
metadata key ``config`` holds the settings.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.spelling import CONTACT_HEAD, EMBEDDING, INV_FREQ, Entry, Spelling, joined, weight_names
from cistron.models.shards import is_safetensors
from cistron.models.sources import TensorSource, from_safetensors, from_tensors, unpickle

REGRESSION_SUFFIX: Final = "-contact-regression"

_TIED: Final = "lm_head.weight"
_PREFIXES: Final = ("encoder.sentence_encoder.", "encoder.")
"""What fair-esm's own loader strips from the names in its ``.pt`` files."""

_MODULES: Final = {
    "esm.embeddings.word_embeddings": "embed_tokens",
    "esm.encoder.layer.{}.attention.LayerNorm": "layers.{}.self_attn_layer_norm",
    "esm.encoder.layer.{}.attention.self.query": "layers.{}.self_attn.q_proj",
    "esm.encoder.layer.{}.attention.self.key": "layers.{}.self_attn.k_proj",
    "esm.encoder.layer.{}.attention.self.value": "layers.{}.self_attn.v_proj",
    "esm.encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "esm.encoder.layer.{}.LayerNorm": "layers.{}.final_layer_norm",
    "esm.encoder.layer.{}.intermediate.dense": "layers.{}.fc1",
    "esm.encoder.layer.{}.output.dense": "layers.{}.fc2",
    "esm.encoder.emb_layer_norm_after": "emb_layer_norm_after",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head": "lm_head",
    "esm.contact_head.regression": "contact_head.regression",
}

_FIELDS: Final = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
"""The settings of fair-esm that vary between its ESM-2 files, and ours."""

_KEPT: Final = ("initializer_range", "max_position_embeddings", "rope_theta")
"""Settings of ours that fair-esm does not have and that change none of its numbers, because rotary frequencies are
stored: they stand beside its own where they are not those of the published models, and fair-esm reads past them."""


def fair_esm_name(native: str) -> str:
    """Return fair-esm's name of a native tensor other than the rotary frequencies.

    >>> fair_esm_name("esm.encoder.layer.7.intermediate.dense.bias")
    'layers.7.fc1.bias'
    """
    module, _, kind = native.rpartition(".")
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", module)
    return f"{_MODULES[pattern].format(*numbers)}.{kind}"


def without_prefix(name: str) -> str:
    """Strip what published files put before a name."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def fair_esm_spelling(config: Esm2Config) -> Spelling:
    """Return fair-esm's tensors; the contact regression is optional, because it is published as a file of its own."""
    entries = {fair_esm_name(name): Entry((name,)) for name in weight_names(config)}
    entries[_TIED] = Entry((EMBEDDING,))
    entries |= {fair_esm_name(name): Entry((name,), required=False) for name in CONTACT_HEAD}
    for i in range(config.num_layers):
        entries[f"layers.{i}.self_attn.rot_emb.inv_freq"] = Entry((INV_FREQ,))
    return Spelling(entries)


def open_fair_esm(path: Path, *, trust_pickle: bool) -> TensorSource:
    """Open a fair-esm file, with the contact regression that stands beside it.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: it is broken, holds something else, or needs `trust_pickle`.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist; a fair-esm model is one .pt or .safetensors file")
    main = _open_file(path, trust_pickle=trust_pickle)
    if any("contact_head" in name for name in main.shapes):
        return main
    for suffix in dict.fromkeys([path.suffix, ".pt", ".safetensors"]):
        beside = regression_file(path, suffix)
        if beside.is_file():
            return joined(main, _open_file(beside, trust_pickle=trust_pickle))
    return main


def regression_file(path: Path, suffix: str = ".pt") -> Path:
    """Return where the contact regression of the model at `path` stands."""
    return path.with_name(f"{path.stem}{REGRESSION_SUFFIX}{suffix}")


def config_from_fair_esm(given: Mapping[str, Any], shapes: Mapping[str, torch.Size], *, path: Path) -> Esm2Config:
    """Return the configuration that fair-esm's settings, and the shapes where those are silent, describe.

    Raises:
        ConfigError: an unknown setting, or one out of range.
        CheckpointError: neither settings nor shapes say how large the model is.
    """
    settings = {"token_dropout": True, **_shown_by_shapes(shapes), **given}
    if unknown := sorted(settings.keys() - {*_FIELDS, *_KEPT}):
        allowed = ", ".join([*_FIELDS, *_KEPT])
        raise ConfigError(f"{path}: unknown fair-esm setting {unknown[0]!r} (allowed: {allowed})")
    if absent := sorted(_FIELDS.keys() - settings):
        raise CheckpointError(f"{path}: no tensor shows {absent[0]}, and no setting gives it; is this an ESM-2?")
    kept = {name: settings[name] for name in _KEPT if name in settings}
    return Esm2Config.from_json({ours: settings[theirs] for theirs, ours in _FIELDS.items()} | kept)


def config_to_fair_esm(config: Esm2Config) -> dict[str, Any]:
    """Return fair-esm's settings of `config`, and those of ours that fair-esm passes by.

    Raises:
        CheckpointError: fair-esm computes something else than one of the settings says.
    """
    if (config.intermediate_size, config.layer_norm_eps) != (4 * config.hidden_size, 1e-5):
        raise CheckpointError(
            "fair-esm fixes the MLP's width at 4 x hidden_size and layer_norm_eps at 1e-5; "
            f"got {config.intermediate_size} for {config.hidden_size}, and {config.layer_norm_eps}"
        )
    kept = {name: getattr(config, name) for name in _KEPT}
    changed = {name: value for name, value in kept.items() if value != Esm2Config.model_fields[name].default}
    return {name: getattr(config, ours) for name, ours in _FIELDS.items()} | changed


def pickled_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``cfg`` as fair-esm reads it: settings that are attributes.

    An ordered dictionary has room for attributes, and unlike a namespace needs nobody's trust when it is unpickled.
    """
    settings = OrderedDict(fields)
    vars(settings).update(fields)
    return {"model": settings}


def _open_file(path: Path, *, trust_pickle: bool) -> TensorSource:
    """Open one file of fair-esm; a pickle's settings become metadata, as safetensors have it."""
    if is_safetensors(path):
        return from_safetensors([path])
    content = unpickle(path, trust_pickle=trust_pickle, allowed=[argparse.Namespace])
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is not a fair-esm file: it must be a mapping with the tensors under 'model'")
    return from_tensors(state, {"config": json.dumps(_stored_settings(content))})


def _stored_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an unpickled file, which are among hundreds of others in ``cfg.model`` or ``args``."""
    section = content.get("cfg")
    model = section.get("model") if isinstance(section, Mapping) else content.get("args")
    settings = vars(model) if isinstance(model, argparse.Namespace) else model
    settings = settings if isinstance(settings, Mapping) else {}
    return {name: settings[name] for name in (*_FIELDS, *_KEPT) if name in settings}


def _shown_by_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Read layers, width and heads off the tensors."""
    shown = {"encoder_layers": sum(name.endswith(".fc1.bias") for name in shapes)}
    embedding, inv_freq = shapes.get("embed_tokens.weight"), shapes.get("layers.0.self_attn.rot_emb.inv_freq")
    if embedding is not None and len(embedding) == 2:
        shown["encoder_embed_dim"] = embedding[1]
        if inv_freq is not None and inv_freq.numel():
            shown["encoder_attention_heads"] = embedding[1] // (2 * inv_freq.numel())
    return shown
