"""ESM-2 checkpoints of fair-esm and Hugging Face, read into and written from native tensors.

Reading is strict before anything is loaded: names and shapes must be those that the configuration asks for. Values are
passed on as stored, the rotary frequencies included, which published files hold rounded. Two parts may be absent: the
contact head becomes zeros, which :meth:`Esm2.predict_contacts` refuses by name, and in Hugging Face's files the
rotary frequencies are then computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError, InputError
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.matching import native_tensors, renamed
from cistron.models.esm2.model import Esm2
from cistron.models.esm2.names import (
    CONTACT_HEAD,
    EMBEDDING,
    FAIR_ESM_PREFIXES,
    FAIR_ESM_TIED,
    INV_FREQ,
    fair_esm_inv_freq,
    fair_esm_name,
    fair_esm_names,
    hugging_face_names,
    modern_hugging_face_name,
)
from cistron.models.manifest import is_plain_name, read_json
from cistron.models.shards import MAX_SHARD_BYTES, is_safetensors, locate_tensors, save_safetensors, write_shards
from cistron.models.sources import TensorSource, from_safetensors, from_tensors, json_metadata, unpickle
from cistron.tokenizers import ESM2_TOKENS

_PICKLED: Final = "pytorch_model.bin"
_PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
_FAIR_ESM_FIELDS: Final = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
"""The settings of fair-esm that vary between its ESM-2 files, and ours."""
_REGRESSION_SUFFIX: Final = "-contact-regression"
_TOKENIZER_CONFIG: Final = {"model_max_length": 10**30, "tokenizer_class": "EsmTokenizer"}


def read_fair_esm(
    source: Path, *, config: Mapping[str, Any] | None, trust_pickle: bool
) -> tuple[Esm2Config, Iterator[tuple[str, torch.Tensor]]]:
    """Read a fair-esm model: the published ``.pt``, or safetensors with the metadata key ``config``.

    A contact regression beside it (``<stem>-contact-regression.pt`` or ``.safetensors``) is read along.

    Args:
        source: the file.
        config: settings in fair-esm's field names, which take precedence over the file's; what neither says is taken
            from the tensors' shapes.
        trust_pickle: allow a ``.pt`` to run code.

    Returns:
        The configuration, and the native tensors, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is not ESM-2's.
    """
    tensors = renamed(_open_fair_esm(source, trust_pickle=trust_pickle), _strip_prefix, path=source)
    settings = {**json_metadata(tensors, "config", path=source), **(config or {})}
    parsed = _fair_esm_config(settings, tensors.shapes, path=source)
    return parsed, native_tensors(tensors, fair_esm_names(parsed), parsed, path=source)


def read_hf(
    source: Path, *, config: Mapping[str, Any] | None, trust_pickle: bool
) -> tuple[Esm2Config, Iterator[tuple[str, torch.Tensor]]]:
    """Read a Hugging Face ``EsmForMaskedLM`` folder, safetensors or pickled, whole or sharded, of any version.

    Args:
        source: the folder.
        config: settings in ``EsmConfig``'s field names, which take precedence over ``config.json``.
        trust_pickle: allow a ``pytorch_model.bin`` to run code.

    Returns:
        The configuration, and the native tensors, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: the folder or one of its files does not exist.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is not ESM-2's.
    """
    if not source.is_dir():
        raise CheckpointNotFoundError(f"{source} is not a folder with config.json and weights")
    parsed = Esm2Config.from_hugging_face({**read_json(source / "config.json"), **(config or {})})
    tensors = renamed(_open_hf(source, trust_pickle=trust_pickle), modern_hugging_face_name, path=source)
    return parsed, native_tensors(tensors, hugging_face_names(parsed), parsed, path=source)


def write_fair_esm(config: Esm2Config, tensors: Iterable[tuple[str, torch.Tensor]], destination: Path) -> None:
    """Write a safetensors file in fair-esm's names, the contact head included unless it is all zeros.

    The tensors are held in memory together: the format has one header for all.

    Raises:
        InputError: the destination's name promises a pickle.
        CheckpointError: fair-esm has no field for a setting of `config`.
    """
    if destination.suffix == ".pt":
        raise InputError("destination: fair-esm files are written as safetensors; end the name in .safetensors")
    if (config.intermediate_size, config.layer_norm_eps) != (4 * config.hidden_size, 1e-5):
        raise CheckpointError(
            f"{destination}: fair-esm fixes the MLP's width at 4 x hidden_size and layer_norm_eps at 1e-5; "
            f"got {config.intermediate_size} for {config.hidden_size}, and {config.layer_norm_eps}"
        )
    native = dict(tensors)
    inv_freq = native.pop(INV_FREQ)
    if not native[CONTACT_HEAD[0]].any():
        native = {name: tensor for name, tensor in native.items() if name not in CONTACT_HEAD}
    theirs = {fair_esm_name(name): tensor.contiguous() for name, tensor in native.items()}
    # Safetensors refuses names that share memory, so every copy owns its own.
    theirs[FAIR_ESM_TIED] = native[EMBEDDING].clone().contiguous()
    theirs |= {name: inv_freq.clone().contiguous() for name in fair_esm_inv_freq(config)}
    fields = {name: getattr(config, ours) for name, ours in _FAIR_ESM_FIELDS.items()}
    save_safetensors(theirs, destination, metadata={"config": json.dumps(fields)})


def write_hf(config: Esm2Config, tensors: Iterable[tuple[str, torch.Tensor]], destination: Path) -> None:
    """Write a folder that ``EsmForMaskedLM`` and ``AutoTokenizer`` load: weights, configuration, vocabulary."""
    names = Esm2(config, device="meta").state_dict()
    write_shards(destination, tensors, names=names, max_shard_bytes=MAX_SHARD_BYTES)
    (destination / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    (destination / "vocab.txt").write_text("\n".join(ESM2_TOKENS))
    (destination / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")


def _open_fair_esm(path: Path, *, trust_pickle: bool) -> TensorSource:
    """Open a fair-esm file, with the contact regression that stands beside it."""
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist; a fair-esm model is one .pt or .safetensors file")
    main = _open_file(path, trust_pickle=trust_pickle)
    if any("contact_head" in name for name in main.shapes):
        return main
    for suffix in dict.fromkeys([path.suffix, ".pt", ".safetensors"]):
        beside = path.with_name(f"{path.stem}{_REGRESSION_SUFFIX}{suffix}")
        if beside.is_file():
            return _joined(main, _open_file(beside, trust_pickle=trust_pickle))
    return main


def _open_file(path: Path, *, trust_pickle: bool) -> TensorSource:
    """Open one file of fair-esm; a pickle's settings become metadata, as safetensors have it."""
    if is_safetensors(path):
        return from_safetensors([path])
    content = unpickle(path, trust_pickle=trust_pickle, allowed=[argparse.Namespace])
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is not a fair-esm file: it must be a mapping with the tensors under 'model'")
    return from_tensors(state, {"config": json.dumps(_pickled_settings(content))})


def _pickled_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an unpickled fair-esm file, which keeps them in a namespace among hundreds of others."""
    section = content.get("cfg")
    model = section.get("model") if isinstance(section, Mapping) else None
    settings = vars(model) if isinstance(model, argparse.Namespace) else model
    settings = settings if isinstance(settings, Mapping) else {}
    return {name: settings[name] for name in _FAIR_ESM_FIELDS if name in settings}


def _joined(first: TensorSource, second: TensorSource) -> TensorSource:
    return TensorSource(
        shapes={**first.shapes, **second.shapes},
        load=lambda name: (first if name in first.shapes else second).load(name),
        metadata=first.metadata,
    )


def _strip_prefix(name: str) -> str:
    for prefix in FAIR_ESM_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _fair_esm_config(given: Mapping[str, Any], shapes: Mapping[str, torch.Size], *, path: Path) -> Esm2Config:
    """Return the configuration that fair-esm's settings, and the shapes where those are silent, describe."""
    settings = {"token_dropout": True, **_shown_by_shapes(shapes), **given}
    if unknown := sorted(settings.keys() - _FAIR_ESM_FIELDS):
        raise ConfigError(f"{path}: unknown fair-esm setting {unknown[0]!r} (allowed: {', '.join(_FAIR_ESM_FIELDS)})")
    if absent := sorted(_FAIR_ESM_FIELDS.keys() - settings):
        raise CheckpointError(f"{path}: no tensor shows {absent[0]}, and no setting gives it; is this an ESM-2?")
    return Esm2Config.from_json({ours: settings[theirs] for theirs, ours in _FAIR_ESM_FIELDS.items()})


def _shown_by_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Read layers, width and heads off the tensors."""
    shown = {"encoder_layers": sum(name.endswith(".fc1.bias") for name in shapes)}
    embedding, inv_freq = shapes.get("embed_tokens.weight"), shapes.get("layers.0.self_attn.rot_emb.inv_freq")
    if embedding is not None and len(embedding) == 2:
        shown["encoder_embed_dim"] = embedding[1]
        if inv_freq is not None and inv_freq.numel():
            shown["encoder_attention_heads"] = embedding[1] // (2 * inv_freq.numel())
    return shown


def _open_hf(folder: Path, *, trust_pickle: bool) -> TensorSource:
    """Open the weights of a Hugging Face folder; safetensors are preferred to pickles."""
    if not any(folder.glob("pytorch_model*.bin")) or any(folder.glob("model*.safetensors")):
        return from_safetensors([folder / file for file in locate_tensors(folder)])
    tensors: dict[str, torch.Tensor] = {}
    for path in _pickled_files(folder):
        state = unpickle(path, trust_pickle=trust_pickle)
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise CheckpointError(f"{path} must hold a mapping of tensors")
        tensors |= state
    return from_tensors(tensors)


def _pickled_files(folder: Path) -> list[Path]:
    if not (folder / _PICKLED_INDEX).exists():
        return [folder / _PICKLED]
    weight_map = read_json(folder / _PICKLED_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(is_plain_name(file) for file in weight_map.values()):
        raise CheckpointError(f"{folder / _PICKLED_INDEX}: 'weight_map' must map tensor names to files of this folder")
    return [folder / file for file in sorted(set(weight_map.values()))]
