"""Evo 2 checkpoints of vortex, read into and written from native tensors; and the training form made inference form.

Everything streams: no function here holds more than a few tensors. Names and shapes are checked before the first tensor
is read, against the configuration, whose source is (in this order) the caller, the file's metadata, or the published
model that the file is named after.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.evo2 import vortex
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.hyena import decayed_taps, factored_log_poles
from cistron.models.evo2.model import Evo2
from cistron.models.published import all_specs
from cistron.models.shards import is_safetensors
from cistron.models.sources import TensorSource, from_safetensors, from_tensors, json_metadata, unpickle
from cistron.models.streaming import write_safetensors

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_NAMES_SHOWN: Final = 5
_PART: Final = re.compile(r"(?P<file>.+\.pt)\.part(?P<number>\d+)")


def read_vortex(
    source: Path, *, config: Mapping[str, Any] | None, trust_pickle: bool
) -> tuple[Evo2Config, Iterator[tuple[str, torch.Tensor]]]:
    """Read a vortex checkpoint: safetensors with the metadata key ``config``, or a ``.pt``, whole or in parts.

    Args:
        source: the file, one of its ``.pt.partN``, or a folder that holds nothing else of these kinds.
        config: settings in vortex's field names, which take precedence over the file's.
        trust_pickle: allow a ``.pt`` to run code.

    Returns:
        The configuration, and the native tensors as stored, each loaded when it is asked for.

    Raises:
        CheckpointNotFoundError: no such file, or a part is missing.
        CheckpointError: a tensor is missing, unexpected or of another shape than the configuration says.
        ConfigError: the configuration is incomplete or not an Evo 2's.
    """
    path = _weight_file(source)
    tensors = _open(path, trust_pickle=trust_pickle)
    parsed = _config(config, tensors, path)
    native = Evo2(parsed, device="meta").state_dict()
    names = {name: vortex.vortex_name(parsed, name) for name in native}
    _check_names(tensors.shapes.keys(), set(names.values()), path)
    for name, like in native.items():
        expected, got = vortex.to_vortex_layout(parsed, name, like).shape, tensors.shapes[names[name]]
        if got != expected:
            raise CheckpointError(
                f"{path}: tensor {names[name]} has shape {list(got)}, the configuration says {list(expected)}"
            )
    return parsed, _load(parsed, tensors, names, path)


def write_vortex(config: Evo2Config, tensors: NamedTensors, destination: Path) -> None:
    """Write native tensors as a safetensors file in vortex's names and layout, with its settings as metadata.

    A destination that ends in ``.pt`` becomes a pickled state dict, the only kind that vortex itself reads; that has no
    place for the settings, which vortex takes from a YAML file.

    The training form is converted to the inference form on the way: vortex knows no other.

    Raises:
        CheckpointError: vortex has no place for a feature of `config`.
    """
    config, tensors = to_inference_form(config, tensors)
    settings = json.dumps(vortex.config_to_vortex(config))
    names = {name: vortex.vortex_name(config, name) for name in Evo2(config, device="meta").state_dict()}
    renamed = ((names[name], vortex.to_vortex_layout(config, name, tensor)) for name, tensor in tensors)
    if destination.suffix != ".pt":
        write_safetensors(destination, renamed, names=names.values(), metadata={"config": settings})
        return
    with tempfile.NamedTemporaryFile(dir=destination.parent, prefix=".", suffix=".safetensors") as mapped:
        write_safetensors(Path(mapped.name), renamed, names=names.values(), metadata={})
        torch.save(load_file(mapped.name), destination)  # The tensors map the file, so memory need not hold them.


def to_inference_form(
    config: Evo2Config, tensors: NamedTensors
) -> tuple[Evo2Config, Iterator[tuple[str, torch.Tensor]]]:
    """Turn a stream of training-form tensors into the inference form of the same function, bit for bit.

    HCL's gamma and p become log poles, and HCM's taps absorb their decay; the rest passes through, as everything does
    when `config` is in inference form already.
    """
    if config.parametrization == "inference":
        return config, iter(tensors)
    return config.model_copy(update={"parametrization": "inference"}), _joined_factors(tensors)


def _joined_factors(tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Hold back a factor until its partner comes."""
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        waiting[name] = tensor
        if {f"{module}.gamma", f"{module}.p"} <= waiting.keys():
            gamma, p = waiting.pop(f"{module}.gamma"), waiting.pop(f"{module}.p")
            yield f"{module}.log_poles", factored_log_poles(gamma, p)
        elif {f"{module}.taps", f"{module}.decay"} <= waiting.keys():
            yield f"{module}.taps", decayed_taps(waiting.pop(f"{module}.taps"), waiting.pop(f"{module}.decay"))
        elif leaf not in {"gamma", "p", "taps", "decay"}:
            yield name, waiting.pop(name)
    yield from waiting.items()  # HCS taps have no decay


def _load(
    config: Evo2Config, tensors: TensorSource, names: Mapping[str, str], path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the native tensors; a stored copy of the tied embedding is compared."""
    for native, foreign in names.items():
        tensor = tensors.load(foreign)
        copied = foreign == vortex.EMBEDDING and config.tie_embeddings and vortex.UNEMBED in tensors.shapes
        if copied and not torch.equal(tensor, tensors.load(vortex.UNEMBED)):
            raise CheckpointError(
                f"{path}: {vortex.UNEMBED} differs from {foreign}, but tie_embeddings says that they are one"
            )
        yield native, vortex.from_vortex_layout(config, native, tensor)


def _check_names(present: Collection[str], expected: Collection[str], path: Path) -> None:
    """Refuse missing and unexpected tensors; say which known extras are dropped."""
    dropped = [name for name in present if vortex.IGNORED.fullmatch(name)]
    if dropped:
        logger.info("%s: dropping %d tensors that are no weights, such as %s", path, len(dropped), dropped[0])
    optional = {*dropped, vortex.UNEMBED}
    for fault, names in (
        ("missing", set(expected) - set(present)),
        ("unexpected", set(present) - set(expected) - optional),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
            raise CheckpointError(f"{path}: {fault} tensor {', '.join(listed[:_NAMES_SHOWN])}{more}")


def _config(given: Mapping[str, Any] | None, tensors: TensorSource, path: Path) -> Evo2Config:
    """Return the configuration from the caller, the metadata, or the published model of the file's name."""
    settings = {**json_metadata(tensors, "config", path=path), **(given or {})}
    if settings:
        return vortex.config_from_vortex(settings, source=path)
    published = {spec.name: spec.config for spec in all_specs()}.get(path.name.partition(".")[0])
    if not isinstance(published, Evo2Config):
        raise ConfigError(
            f"{path} says nothing about its configuration and is not named after a published model; pass config= with "
            "a mapping or file of vortex's settings (hidden_size, num_layers, hcs_layer_idxs, ...)"
        )
    return published


def _weight_file(source: Path) -> Path:
    """Return the weight file that `source` means, which may exist only in parts."""
    if source.is_dir():
        found = {_unsplit(path) for path in source.iterdir() if _unsplit(path).suffix in {".pt", ".safetensors"}}
        if len(found) != 1:
            listed = ", ".join(sorted(path.name for path in found)) or "none"
            raise CheckpointNotFoundError(f"{source} must hold one .pt or .safetensors checkpoint, found {listed}")
        return found.pop()
    return _unsplit(source)


def _unsplit(path: Path) -> Path:
    """Return the path of the file that a part belongs to; other paths stay."""
    match = _PART.fullmatch(path.name)
    return path.with_name(match["file"]) if match else path


def _open(path: Path, *, trust_pickle: bool) -> TensorSource:
    """Open a weight file; parts are joined in a temporary file, which is gone once its tensors are mapped."""
    if is_safetensors(path):
        return from_safetensors([path])
    parts = {int(match["number"]): part for part in path.parent.glob("*") if (match := _part_of(part, path))}
    if path.exists() or not parts:
        return _pickled(path, path, trust_pickle=trust_pickle)
    if absent := sorted(set(range(max(parts) + 1)) - parts.keys()):
        raise CheckpointNotFoundError(f"{path}.part{absent[0]} does not exist, but part {max(parts)} does")
    folder = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".joined") as joined:
        for number in range(len(parts)):
            with parts[number].open("rb") as part:
                shutil.copyfileobj(part, joined, length=1 << 24)
        joined.flush()
        return _pickled(Path(joined.name), path, trust_pickle=trust_pickle)


def _part_of(candidate: Path, path: Path) -> re.Match[str] | None:
    match = _PART.fullmatch(candidate.name)
    return match if match and match["file"] == path.name else None


def _pickled(path: Path, shown: Path, *, trust_pickle: bool) -> TensorSource:
    """Map the tensors of a ``.pt``; FP8 states in it may be byte streams."""
    content = unpickle(path, trust_pickle=trust_pickle, allowed=[io.BytesIO])
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown} must hold a mapping of tensors, got a {type(content).__name__}")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif vortex.IGNORED.fullmatch(name):
            logger.info("%s: dropping %s, which is no tensor", shown, name)
        else:
            raise CheckpointError(f"{shown}: {name} is a {type(value).__name__}, not a tensor")
    return from_tensors(tensors)
