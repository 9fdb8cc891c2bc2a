"""The native checkpoint: a folder of ``config.json``, safetensors and ``manifest.json``; ESM-2's tokenizer files too.

Both directions are strict and stream. Writing holds one tensor at a time and checks each against the configuration;
nothing appears under the destination's name before all of it is right. Reading checks the manifest, then the list of
names and shapes in the files' headers, and only then moves tensors, one by one, into a model that was built on the meta
device: the weights are never in memory twice, and a model with a missing tensor is never returned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.io.atomic import new_directory
from cistron.models.base import SequenceModel
from cistron.models.families import ModelConfig, build, companion_files, config_of, parse_config
from cistron.models.manifest import MANIFEST, read_json, read_manifest, verify_files, write_manifest
from cistron.models.shards import (
    MAX_SHARD_BYTES,
    NamedTensors,
    locate_tensors,
    read_tensors,
    tensor_shapes,
    write_shards,
)

CONFIG: Final = "config.json"
_NAMES_SHOWN: Final = 5


def save_checkpoint(
    model: SequenceModel,
    destination: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `model` as a native checkpoint and return its folder.

    Args:
        model: its state dict holds whole tensors, on any device.
        destination: a folder that does not exist yet, or is empty.
        provenance: facts for the manifest, such as the run and step that made the weights.
        max_shard_bytes: size above which the weights are split into several files.

    Raises:
        InputError: the destination exists.
    """
    return write_checkpoint(
        config_of(model),
        model.state_dict().items(),
        destination,
        provenance=provenance,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    config: ModelConfig,
    tensors: NamedTensors,
    destination: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a stream of native tensors as a checkpoint of `config`; see :func:`save_checkpoint`.

    Raises:
        InputError: the destination exists.
        CheckpointError: a tensor is missing, unknown, given twice or of another shape than `config` says.
    """
    destination = Path(destination)
    with new_directory(destination) as staging:
        checked = check_tensors(tensors, config, source=str(destination))
        write_shards(staging, checked, names=_expected_shapes(config), max_shard_bytes=max_shard_bytes)
        (staging / CONFIG).write_text(json.dumps(config.to_json(), indent=2, sort_keys=True) + "\n")
        for name, text in companion_files(config).items():
            (staging / name).write_text(text)
        write_manifest(staging, provenance or {})
    return destination


def load_checkpoint(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> SequenceModel:
    """Return the model of a native checkpoint, in eval mode.

    Args:
        directory: the checkpoint's folder.
        device: where the weights go; torch's default device if not given.
        dtype: None keeps each tensor as stored; otherwise the model's dtype policy for that dtype applies.
        verify: compare every file with its sha256 first; sizes are always compared.

    Raises:
        CheckpointNotFoundError: the folder or one of its files does not exist.
        CheckpointError: a file is not what the manifest says, or a tensor is missing, unknown or of the wrong shape.
    """
    config, files = _open(directory, verify=verify)
    model = build(config, device="meta", dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()} if dtype is not None else {}
    target = torch.device(device) if device is not None else torch.get_default_device()
    # An owned copy: a tensor that still mapped its file would change, or crash, when the file does.
    weights = {
        name: _floating(name, tensor, source=str(directory)).to(
            device=target, dtype=dtypes.get(name, tensor.dtype), copy=True
        )
        for name, tensor in read_tensors(Path(directory), files)
    }
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def iterate_checkpoint(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a native checkpoint one by one, as stored, after all checks of :func:`load_checkpoint`."""
    _, files = _open(directory, verify=True)
    yield from read_tensors(Path(directory), files)


def read_config(directory: str | Path) -> ModelConfig:
    """Return the configuration of a native checkpoint.

    Raises:
        CheckpointError: ``config.json`` is missing, unreadable or holds a setting that its family refuses.
    """
    path = _existing(directory) / CONFIG
    settings = read_json(path)
    try:
        return parse_config(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_tensors(tensors: NamedTensors, config: ModelConfig, *, source: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass `tensors` on while comparing them with what a model of `config` holds.

    Raises:
        CheckpointError: at the first tensor that is unknown, repeated or of the wrong shape, and at the end when some
            did not come; `source` names the stream.
    """
    expected = _expected_shapes(config)
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"{source}: tensor {name} was given twice")
        seen.add(name)
        _compare({name: tensor.shape}, {name: expected[name]} if name in expected else {}, source=source)
        yield name, _floating(name, tensor, source=source)
    _compare({name: expected[name] for name in seen}, expected, source=source)


def _open(directory: str | Path, *, verify: bool) -> tuple[ModelConfig, dict[str, list[str]]]:
    """Check a checkpoint without reading its tensors; return its configuration and each weight file's tensor names."""
    directory = _existing(directory)
    try:
        verify_files(directory, hashes=verify)
    except CheckpointError:
        _name_wrong_tensors(directory)
        raise
    config = read_config(directory)
    files = locate_tensors(directory)
    listed = read_manifest(directory)["files"]
    for name in (CONFIG, *files):
        if name not in listed:
            raise CheckpointError(f"{directory / name} belongs to the checkpoint, but {MANIFEST} does not list it")
    _compare(tensor_shapes(directory, files), _expected_shapes(config), source=str(directory))
    return config, files


def _name_wrong_tensors(directory: Path) -> None:
    """Raise ``CheckpointError`` where the files can be read and their tensors say more than their sizes do."""
    try:
        config = read_config(directory)
        shapes = tensor_shapes(directory, locate_tensors(directory))
    except CheckpointError:
        return
    _compare(shapes, _expected_shapes(config), source=str(directory))


def _existing(directory: str | Path) -> Path:
    path = Path(directory)
    if not path.exists():
        raise CheckpointNotFoundError(f"no checkpoint at {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, and a Cistron checkpoint is a folder; see `cistron convert --help`")
    return path


def _expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in build(config, device="meta").state_dict().items()}


def _compare(got: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], *, source: str) -> None:
    """Raise ``CheckpointError`` when names or shapes differ."""
    if missing := sorted(expected.keys() - got.keys()):
        raise CheckpointError(f"{source}: missing {_listed(missing)}")
    if extra := sorted(got.keys() - expected.keys()):
        raise CheckpointError(f"{source}: the configuration has no {_listed(extra)}")
    for name, shape in got.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(shape)}, the configuration says {list(expected[name])}"
            )


def _floating(name: str, tensor: torch.Tensor, *, source: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{source}: tensor {name} holds {tensor.dtype}, and weights are floating-point numbers")
    return tensor


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"tensor {', '.join(names[:_NAMES_SHOWN])}{more}"
